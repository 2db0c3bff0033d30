"""How blocks are executed: the plan, the stack that runs it, and the checks of it.

plan.py         how the blocks are executed: what fits, what is fastest
stack.py        all blocks of a transformer under a plan
layerwise.py    a transformer that lies on the CPU, run on the device a layer at a time
execution.py    the plan of a run: sizes, the machine measured, blocks placed
block_check.py  blocks as a plan runs them against diffusers' own, before the first step
warm_up.py      the largest bucket before the first step, where no plan bounds the memory
"""
