"""The heart of the sync: from two trees and their ancestor to equal trees.

=========== =====================================================================
traits      which names and kinds a host's filesystem can hold
rules       ``.wherryignore`` -> regular expressions
diff        what differs between two trees
reconcile   ancestor, host's tree, guest's tree -> decisions; pure
plan        decisions -> operations in order, contents to transfer; pure
safety      whether a tree may be believed at all; pure
recover     what an ancestor is worth after a loss of power; pure
store       the ancestor and what is not on both disks yet; SQLite
keep        files that must not get lost: conflicts, and the trash
transfer    how far that is
cycle       scan, decide, transfer, apply, remember
=========== =====================================================================

**The invariants.** Of the ancestor: it holds at a path only what was on both sides at once.
Of values: whatever was written on either side is current, or was replaced by a change whose
author's side had it, or is kept (conflicts, trash, rescued). Of order: pending first, then
contents, then renames, then the ancestor, and pending no more once both disks have it.
"""
