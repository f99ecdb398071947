// dh -> dx and dA, with one read of x (the symbols are those of docs/architecture.md). In the order they run:
//
//   pad            dh in the compute dtype, and A as the product reads it
//   expand         dx
//   outer          partial dA: x times dh, summed over a chunk of tokens
//   reduce_chunks  dA of every expert: the sum over tokens

#include "expand.cuh"
#include "outer.cuh"
#include "pad.cuh"
#include "reduce_chunks.cuh"

void grad_input(const GradInput& p) {
  use_device(static_cast<int>(p.device));
  const int64_t RP = rank16(p.r);
  Padding round{};
  round.from[0] = {p.dh, kFloat32};
  round.to[0] = p.u;
  round.experts[0] = p.T * p.b * down_slots(p);
  round.rows = round.to_rows = 1;
  round.columns = p.r;
  round.to_columns = RP;
  pad(p, round, false);
  if (p.need_dx) {
    pad(p, &Bank::A, p.r, p.d, p.d, RP, true);
    Expand e(p, Space::kDown);
    e.u = p.u;
    e.L = p.d;
    e.slices = p.slices;
    e.dmean = p.dmean;
    e.route_mask = p.route_mask;
    e.out = p.dx;
    for (int bank = 0; bank < p.b; ++bank) e.weights.bank[bank] = p.banks[bank].padded;
    e.weights.expert = p.d * RP;
    e.weights.row = RP;
    expand("grad_input dx", e);
  }
  if (!p.need_A) return;
  Outer o(p, Space::kDown);
  o.src = p.x;
  o.u = p.u;
  o.L = p.d;
  o.chunk = p.chunk;
  o.chunks = p.chunks;
  o.by_column = 1;
  o.part = p.A_part;
  o.chunk_to_seq = p.chunk_to_seq;
  outer("grad_input dA", o);
  ReduceChunks c(p, Space::kDown);
  c.part = p.A_part;
  c.chunk_to_seq = p.chunk_to_seq;
  c.L = p.d;
  c.chunks = p.chunks;
  c.by_column = 1;
  c.scale = 256.0 / static_cast<double>(256 - p.threshold);
  for (int bank = 0; bank < p.b; ++bank) {
    c.experts[bank] = p.shared ? 1 : p.banks[bank].E;
    c.trained[bank] = p.banks[bank].trained;
    c.out[bank] = p.banks[bank].dA;
  }
  reduce_chunks(c);
}
