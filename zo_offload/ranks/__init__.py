"""Several processes that train one run together: who computes which lanes, and what they tell each other.

- exchange: a table of rows that all ranks write and read; what carries them is torch's store
- team: turns of that exchange: gather, errors, stops, who is missing; alone: the answers of one process
- agree: what must be equal on all ranks, named where it is not
- launcher, find: the ranks that this process was started with: torchrun, accelerate launch, an own process group
- pool: ranks that come and go, around one that keeps the run: keeper (with its desk) and member, which lease and commit
  lanes (sharing) at a pace that is learnt (pace), through a store (line, sealed), and apply what is decided
"""
