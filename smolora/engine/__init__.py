"""The engine: a linear layer with a mixture of low-rank experts on it, in four passes and any backend.

`function.mixture_linear` is the way in. It knows banks, routers, slots and mixes (`smolora.spec`), and no method.
"""
