// What programs do with npm's dockerode. The name of one of them is the argument.
"use strict";

const assert = require("node:assert");
const { createHash, randomBytes } = require("node:crypto");
const { once } = require("node:events");
const { PassThrough } = require("node:stream");
const Docker = require("dockerode");
const tar = require("tar-fs");

const docker = new Docker(); // as DOCKER_HOST says

async function text(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return Buffer.concat(chunks);
}

// The two outputs of a multiplexed stream, read to its end.
async function demuxed(stream) {
  const out = new PassThrough();
  const err = new PassThrough();
  docker.modem.demuxStream(stream, out, err);
  stream.on("end", () => { out.end(); err.end(); });
  return Promise.all([text(out), text(err)]);
}

async function box(options = {}) {
  const container = await docker.createContainer({
    Image: "busybox", Cmd: ["sleep", "100000"], HostConfig: { Init: true }, ...options,
  });
  await container.start();
  return container;
}

const programs = {
  // A hijacked exec: its input is ended by half-closing the connection.
  async exec() {
    const container = await box();
    const exec = await container.exec({
      Cmd: ["sh", "-c", "cat; echo err >&2; exit 6"],
      AttachStdin: true, AttachStdout: true, AttachStderr: true,
    });
    const stream = await exec.start({ hijack: true, stdin: true });
    const data = randomBytes(2 << 20);
    stream.end(data);
    const [out, err] = await demuxed(stream);
    const digest = (bytes) => createHash("sha256").update(bytes).digest("hex");
    assert.equal(digest(out), digest(data));
    assert.equal(err.toString(), "err\n");
    assert.equal((await exec.inspect()).ExitCode, 6);

    const plain = await container.exec({ Cmd: ["echo", "plain"], AttachStdout: true });
    const [said] = await demuxed(await plain.start({}));
    assert.equal(said.toString(), "plain\n");
  },

  // A hijacked attach, before the start, so that nothing is missed.
  async attach() {
    const container = await docker.createContainer({
      Image: "busybox", Cmd: ["sh", "-c", "cat; echo end"],
      OpenStdin: true, StdinOnce: true, AttachStdin: true, AttachStdout: true, AttachStderr: true,
    });
    const stream = await container.attach({
      stream: true, stdin: true, stdout: true, stderr: true, hijack: true,
    });
    const output = demuxed(stream);
    await container.start();
    stream.end("through\n");
    assert.equal((await output)[0].toString(), "through\nend\n");
    assert.equal((await container.wait()).StatusCode, 0);
  },

  // A terminal: raw bytes, and a resize.
  async tty() {
    const container = await docker.createContainer({
      Image: "busybox", Cmd: ["sh"], Tty: true, OpenStdin: true,
    });
    const stream = await container.attach({ stream: true, stdin: true, stdout: true, hijack: true });
    await container.start();
    await container.resize({ h: 33, w: 111 });
    stream.write("stty size; exit\n");
    assert.match((await text(stream)).toString(), /33 111/);
  },

  // Build from a tar stream, each line of the log as it comes.
  async build() {
    const context = tar.pack(process.argv[3]);
    const stream = await docker.buildImage(context, { t: "dockerode:1", nocache: true });
    const lines = await new Promise((resolve, reject) => {
      docker.modem.followProgress(stream, (error, all) => error ? reject(error) : resolve(all));
    });
    assert(lines.some((line) => line.stream === "was-run\n"), JSON.stringify(lines));
    await docker.getImage("dockerode:1").remove();
  },

  // Events come while they happen, and the stream can be left.
  async events() {
    const stream = await docker.getEvents({ filters: { type: ["container"] } });
    const seen = [];
    let rest = "";
    stream.on("data", (chunk) => {
      const lines = (rest + chunk).split("\n");
      rest = lines.pop();
      seen.push(...lines.map((line) => JSON.parse(line).Action));
    });
    const container = await box();
    await container.remove({ force: true });
    while (!seen.includes("destroy")) await once(stream, "data");
    assert.deepEqual(
      seen.filter((action) => ["create", "start", "die", "destroy"].includes(action)),
      ["create", "start", "die", "destroy"],
    );
    stream.destroy();
  },

  // Logs are followed; archives go both ways.
  async logs_and_archives() {
    const container = await box({
      Cmd: ["sh", "-c", "echo first; until [ -e /go ]; do sleep 0.1; done; echo second"],
    });
    const [out, err] = [new PassThrough(), new PassThrough()];
    const stream = await container.logs({ follow: true, stdout: true, stderr: true });
    docker.modem.demuxStream(stream, out, err);
    assert.equal((await once(out, "data"))[0].toString(), "first\n");
    // It may come before the answer of what it waits for, and is heard only by who listens then.
    const second = once(out, "data");
    const pack = tar.pack(process.argv[3], { entries: ["go"] });
    await container.putArchive(pack, { path: "/" });
    assert.equal((await second)[0].toString(), "second\n");
    const back = await text(await container.getArchive({ path: "/go" }));
    assert(back.includes("content of go"));
  },
};

programs[process.argv[2]]()
  .then(() => console.log("passed"))
  .catch((error) => { console.error(error); process.exit(1); });
