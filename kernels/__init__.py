"""SMoLoRA's passes in Triton; `smolora.kernels.passes` has the four.

Kernel names: `i_` ids, `o_` offsets, `m_` masks, `p_` pointers, `b_` loaded blocks; `BT` and the like are tile sizes,
`n` instances, `T` tokens, `S` tokens of each instance when they are not packed, `b` branches in use, `K` chosen
experts of a branch, `R` their rank.

Nothing is imported here: run from the project's own folder, transformers takes this for a library of the same name.
"""
