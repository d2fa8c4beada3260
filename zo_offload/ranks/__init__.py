"""Several processes that train one run together: who computes which lanes, and what they tell each other.

- exchange: a table of rows that all ranks write and read; what carries them is torch's store
- team: turns of that exchange: gather, errors, stops, who is missing; `Alone` for one process
- agree: what must be equal on all ranks, named where it is not
- launcher, find: the ranks that this process was started with: torchrun, accelerate launch, an own process group
"""
