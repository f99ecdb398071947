// From rank space back to the input: dx, and the gradients of A from one read of x. In the order they run:
//
//   pack     dh in the compute dtype, and A as the product reads it
//   expand   dx
//   outer    partial dA of a chunk of tokens
//   collect  dA of every expert

#include "collect.cuh"
#include "expand.cuh"
#include "outer.cuh"
#include "pack.cuh"

void grad_input(const GradInput& p) {
  use_device(static_cast<int>(p.device));
  const int64_t RP = rank16(p.r);
  Packing round{};
  round.from[0] = {p.dh, kFloat32};
  round.to[0] = p.u;
  round.experts[0] = p.T * p.b * down_slots(p);
  round.rows = round.to_rows = 1;
  round.columns = p.r;
  round.to_columns = RP;
  pack(p, round, false);
  if (p.need_dx) {
    pack(p, &Bank::A, p.r, p.d, p.d, RP, true);
    Expand e(p, Space::kDown);
    e.u = p.u;
    e.L = p.d;
    e.split_k = p.split_k;
    e.dmean = p.dmean;
    e.mask = p.mask;
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
  Collect c(p, Space::kDown);
  c.part = p.A_part;
  c.chunk_to_seq = p.chunk_to_seq;
  c.L = p.d;
  c.chunks = p.chunks;
  c.by_column = 1;
  c.scale = 256.0 / static_cast<double>(256 - p.threshold);
  for (int bank = 0; bank < p.b; ++bank) {
    c.experts[bank] = p.shared ? 1 : p.banks[bank].E;
    c.out[bank] = p.banks[bank].dA;
  }
  collect(c);
}
