"""The static throughput model behind bench/throughput.py: times of kernels predicted from their machine code.

machines     figures of each GPU, with a source each; overridden by a calibration run
sass         instructions with control bits and source lines, from nvdisasm
opcodes      the class of every instruction, and what it costs
flow         basic blocks, dominators and natural loops
trips        declared trip counts of the kernels' loops
simulate     one multiprocessor, instruction by instruction
compiled     launches recorded and compiled, and where their memory accesses go
kernel       the prediction for one launch
layer        the passes and a whole layer
"""
