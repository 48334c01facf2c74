"""The Docker API's endpoint: a streaming proxy that other features can hook into.

    server.Endpoint          listener, limit, counters
    ├── refusals             clients beyond the limit
    └── connection           one client: its requests, on their way to the engine
        ├── local            the client's socket or pipe
        ├── downstream       the answers on their way back
        ├── exchange         one request and its answer; runs what watches the answer
        ├── hooks            what other features fill
        ├── heads            what a request that has not gone on may take
        ├── messages         where requests and answers begin and end (no sockets)
        │   ├── http         heads: h11, and what h11 lets pass
        │   └── framing      bodies, scanned and not rebuilt
        └── answers          answers of our own, as the engine words them

A request is judged by its head; after that its bytes, and those of its answer, are
passed on as they are and only counted. What is not rewritten by a hook arrives byte for
byte.
"""
