"""The passes in Triton, for any mixture of low-rank experts; `smolora.kernels.passes` has the four.

Names in kernels: `i_` an index, `o_` offsets, `m_` a mask, `p_` pointers, `b_` a loaded block; `_ptr` an argument that
points to a tensor, `_ptrs` a tuple with one tensor a bank. An absent argument is None, and the kernel is specialised
for it. Sizes: T tokens in `num_seqs` sequences of `seq_len` tokens (or packed, with `cu_seqlens`), K slots of a bank,
R ranks, padded to RP; `BT` and the like are tile sizes. docs/architecture.md has the mathematical symbols.

Nothing is imported here: run from the project's own folder, transformers takes this for a library of the same name.
"""
