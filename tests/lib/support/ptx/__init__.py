"""Triton's kernels as compiled for a card, run on the CPU: their PTX is executed, and their accesses are checked.

`worker.run` is the way in: it runs a function in a process in which kernels are compiled rather than interpreted.

A block's threads go on together, one instruction at a time, and blocks one after another. What parallel execution could
reorder is not tried but recorded: every byte of memory knows who wrote and who read it since the last barrier. Races
between lanes of one warp are not looked for. Tensor cores add exactly and round once, and approximate functions are
correctly rounded, so a card's last bits differ.
"""
