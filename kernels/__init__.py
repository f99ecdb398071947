"""The passes in Triton, for any mixture of low-rank experts; `smolora.kernels.passes` has the four.

Names in kernels: `i_` an index, `o_` offsets, `m_` a mask, `p_` pointers, `b_` a loaded block; `_ptr` an argument that
points to a tensor, `_ptrs` one tensor a bank. An argument that may be absent is None, and the kernel is compiled for
that. Sizes: T tokens in `num_seqs` sequences of `seq_len` tokens (or packed, with `cu_seqlens`), K slots of a bank,
R ranks, RP ranks as padded; `BT` and the like are tile sizes.

Nothing is imported here: run from the project's own folder, transformers takes this for a library of the same name.
"""
