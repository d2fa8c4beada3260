"""Several processes that train one run together: they share the lanes and exchange messages.

- exchange: a table of rows that all ranks write and read, stored in torch's store
- team: turns of that exchange: gather, errors, stops, missing ranks; alone: the same interface for one process
- agree: compares values between ranks and names the differences
- launcher, find: the ranks that this process was started with: torchrun, accelerate launch, an own process group
- pool: ranks that come and go, around one that keeps the run: keeper (with its desk) and member, which lease and commit
  lanes (sharing) at a measured pace (pace), through a store (line, sealed), and apply decided steps
"""
