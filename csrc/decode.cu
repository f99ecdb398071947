// One token an instance, in one launch for all projections of an input: y += the adapter's output.
//
// Each projection has blocks of its own. Before the grid's barrier they share out what reads weights alone: A x of the
// experts somebody may use, router logits, and w = s B^T I, each in parts over slices of d or k. After it every block
// adds the parts up for all instances, chooses, mixes, and expands to a range of outputs of its own. All sums run in an
// order that neither the number of blocks nor the other projections change.

#include "common.cuh"
#include "grid.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSlice = limits::kDecodeInputs;  // 32 lanes of kVectors vectors of 4
constexpr int kVectors = kSlice / 128;
constexpr int kOutputs = limits::kDecodeOutputs;
constexpr int kMixed = limits::kDecodeNumbers;  // what B is multiplied with, and experts, that a block holds

struct Projections {
  Decode of[limits::kDecodeProjections];
  int first_block[limits::kDecodeProjections + 1] = {};  // of each one, then the number of blocks
};

static_assert(sizeof(Projections) <= 4096);  // what every driver takes for a kernel's arguments

struct Items {  // what a projection's blocks share out before the barrier
  int64_t vu_rows, A_rows, rows;  // of A in the VU branch, of A, and of those and the VU router
  int64_t slices, dots, parts, logits;
  __host__ __device__ explicit Items(const Decode& p) {
    vu_rows = p.use_vu ? p.M * p.r : 0;
    A_rows = vu_rows + (p.use_if ? p.N * p.r : 0);
    rows = A_rows + (p.route && p.use_vu ? p.M : 0);
    slices = cdiv(p.d, kSlice);
    dots = cdiv(rows, kWarps) * slices;
    parts = p.adaptive ? cdiv(p.k, kOutputs) * (p.M + p.N) : 0;
    logits = p.route && p.use_if ? cdiv(p.n * p.N, kWarps) : 0;
  }
  __host__ __device__ int64_t total() const { return dots + parts + logits; }
};

// Which instances use expert e of M + N, as bits: all may where they are routed here.
__device__ uint64_t users_of(const Decode& p, int e) {
  if (p.route) return ~0ull;
  const int b = static_cast<int>(p.use_vu + p.use_if), K = static_cast<int>(p.K), n = static_cast<int>(p.n);
  const bool vu = e < p.M;
  if (!(vu ? p.use_vu : p.use_if)) return 0;
  const int slot = vu ? 0 : b - 1, expert = vu ? e : e - static_cast<int>(p.M);
  const auto routes = global<const int>(p.given_routes);
  uint64_t users = 0;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < K; ++j) users |= static_cast<uint64_t>(routes[(i * b + slot) * K + j] == expert) << i;
  }
  return users;
}

// sum + a row of B, as the compute dtype has it, times r numbers; 16 of the row are on their way at a time.
template <class T, class W>
__device__ __forceinline__ float add_row(float sum, Ptr<const W> row, Ptr<const float> with, int r, bool aligned) {
  for (int rank = 0; rank < r; rank += 16) {
    float v[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) four_at(v[j], row, rank + j * 4, r - rank - j * 4, aligned);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (rank + j < r) sum += rounded<T>(v[j / 4][j % 4]) * with[rank + j];
    }
  }
  return sum;
}

// A warp's product of one row of A, or of the router, with a slice of every token that needs it.
template <class T>
__device__ void dot_item(const Decode& p, const Items& items, int64_t row, int64_t slice, int lane,
                         Ptr<const uint64_t> users) {
  const bool router = row >= items.A_rows, vu = row < items.vu_rows;
  const Weight weight = router ? p.vu_router : vu ? p.vu_A : p.if_A;
  const int64_t source = row - (router ? items.A_rows : vu ? 0 : items.vu_rows);
  const uint64_t here = router ? ~0ull : users[(vu ? 0 : p.M) + source / p.r];
  if (here == 0) return;
  const bool aligned = p.d % 4 == 0 && is_aligned(weight.data, 16);
  float a[kVectors][4];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = slice * kSlice + v * 128 + lane * 4;
    four_at(a[v], weight, source * p.d + c, p.d - c, aligned);
#pragma unroll
    for (int j = 0; j < 4; ++j) a[v][j] = router ? a[v][j] : rounded<T>(a[v][j]);
  }
  auto x = global<const T>(p.x);
  for (int64_t i = 0; i < p.n; ++i) {
    if (!(here >> i & 1)) continue;
    const bool seen = !router || p.mask == nullptr || global<const uint8_t>(p.mask)[i];
    float sum = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = slice * kSlice + v * 128 + lane * 4;
      float b[4];
      four_at(b, x, i * p.d + c, seen ? p.d - c : 0, p.d % 4 == 0 && is_aligned(p.x, 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += a[v][j] * b[j];
    }
    sum = warp_sum(sum);
    if (lane == 0 && router) global<float>(p.z_part)[(slice * p.n + i) * p.M + source] = sum;
    if (lane == 0 && !router) global<float>(p.h_part)[(slice * p.n + i) * items.A_rows + row] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ Projections all) {
  int mine = 0;  // the block's projection
  while (static_cast<int>(blockIdx.x) >= all.first_block[mine + 1]) ++mine;
  const Decode& p = all.of[mine];
  const int block = blockIdx.x - all.first_block[mine], blocks = all.first_block[mine + 1] - all.first_block[mine];
  Arena arena;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int b = static_cast<int>(p.use_vu + p.use_if), K = static_cast<int>(p.K), r = static_cast<int>(p.r);
  const int E = static_cast<int>(p.M + p.N), slots = b * K, columns = slots * r;
  auto users = arena.take<uint64_t>(E);
  auto scratch = arena.take<float>(kThreads * 4);
  auto w = arena.take<float>(E * r);
  auto z = arena.take<float>(kWarps * E);
  auto routes = arena.take<int>(kWarps * slots);
  auto gates = arena.take<float>(kWarps * slots);
  const int group = max(1, min(static_cast<int>(p.n), kMixed / (columns + slots)));  // instances mixed at a time
  auto experts = arena.take<int>(group * slots);
  auto u = arena.take<float>(group * columns);

  for (int e = threadIdx.x; e < E; e += kThreads) users[e] = users_of(p, e);
  __syncthreads();
  const Items items(p);
  for (int64_t item = block; item < items.total(); item += blocks) {
    if (item < items.dots) {
      const int64_t row = item / items.slices * kWarps + warp;
      if (row < items.rows) dot_item<T>(p, items, row, item % items.slices, lane, users);
    } else if (item < items.dots + items.parts) {
      const int64_t expert = (item - items.dots) % E, part = (item - items.dots) / E;
      if (users[expert] == 0) continue;
      const bool vu = expert < p.M;
      add_w_part<T, kThreads>(p, vu ? p.vu_B : p.if_B, vu ? p.vu_importance : p.if_importance, p.k,
                              vu ? expert : expert - p.M, part * kOutputs, min(p.k, (part + 1) * kOutputs), scratch,
                              global<float>(p.w_part) + (part * E + expert) * r);
      __syncthreads();  // before the next item's scratch
    } else {  // a warp an instance and IF expert
      const int64_t pair = (item - items.dots - items.parts) * kWarps + warp;
      if (pair >= p.n * p.N) continue;
      const float sum = warp_dot(p.if_router, pair % p.N * p.e, p.instruction, pair / p.N * p.e, p.e);
      if (lane == 0) global<float>(p.z_if)[pair] = sum;
    }
  }
  grid_barrier();

  if (p.adaptive) {
    const int64_t parts = cdiv(p.k, kOutputs);
    for (int c = threadIdx.x; c < E * r; c += kThreads) {
      float sum = 0;
      if (users[c / r] != 0) {
        for (int64_t i = 0; i < parts; ++i) sum += global<const float>(p.w_part)[i * E * r + c];
      }
      w[c] = sum;
    }
  }
  __syncthreads();

  const int64_t span = cdiv(cdiv(p.k, blocks), 8) * 8;
  const int64_t first_output = min(p.k, block * span);
  const int outputs = static_cast<int>(min(p.k, first_output + span) - first_output);
  const bool aligned = r % 4 == 0 && is_aligned(p.vu_B.data, 16) && is_aligned(p.if_B.data, 16);
  for (int64_t begin = 0; begin < p.n; begin += group) {
    const int count = static_cast<int>(min(static_cast<int64_t>(group), p.n - begin));
    for (int g = warp; g < count; g += kWarps) {  // a warp an instance: route, mix
      const int64_t i = begin + g;
      auto my_routes = routes + warp * slots;
      auto my_gates = gates + warp * slots;
      if (p.route) {
        auto logits = z + warp * E;
        for (int expert = lane; expert < E; expert += 32) {
          float sum = 0;
          if (expert < p.M && p.use_vu) {
            const auto part = global<const float>(p.z_part) + (i * p.M + expert);
            for (int64_t s = 0; s < items.slices; ++s) sum += part[s * p.n * p.M];
          } else if (expert >= p.M && p.use_if) {
            sum = global<const float>(p.z_if)[i * p.N + expert - p.M];
          }
          logits[expert] = sum;
          if (block == 0) global<float>(p.logits)[i * E + expert] = sum;
        }
        __syncwarp();
        if (lane == 0 && p.use_vu) choose(logits, static_cast<int>(p.M), K, my_routes, my_gates);
        if (lane == 0 && p.use_if) {
          choose(logits + p.M, static_cast<int>(p.N), K, my_routes + p.use_vu * K, my_gates + p.use_vu * K);
        }
      } else {
        for (int j = lane; j < slots; j += 32) {
          my_routes[j] = global<const int>(p.given_routes)[i * slots + j];
          my_gates[j] = global<const float>(p.given_gates)[i * slots + j];
        }
      }
      __syncwarp();
      for (int j = lane; j < slots; j += 32) {
        experts[g * slots + j] = my_routes[j];
        if (block == 0) {
          global<int>(p.routes)[i * slots + j] = my_routes[j];
          global<float>(p.gates)[i * slots + j] = my_gates[j];
        }
      }
      float lead = 0;
      for (int c = lane; c < columns; c += 32) {
        const int slot = c / r, rank = c % r;
        const bool vu = p.use_vu && slot < K;
        const int64_t row = (vu ? 0 : items.vu_rows) + static_cast<int64_t>(my_routes[slot]) * r + rank;
        const auto part = global<const float>(p.h_part) + (i * items.A_rows + row);
        float h = 0;
        for (int64_t s = 0; s < items.slices; ++s) h += part[s * p.n * items.A_rows];
        u[g * columns + c] = h;
        if (p.adaptive) {
          const float score = my_gates[slot] * w[((vu ? 0 : p.M) + my_routes[slot]) * r + rank] * h;
          lead += vu ? score : -score;
        }
      }
      lead = p.adaptive ? warp_sum(lead) : static_cast<float>(p.fixed_lead);
      if (block == 0 && lane == 0) global<float>(p.lead)[i] = lead;
      for (int c = lane; c < columns; c += 32) {
        const int slot = c / r;
        const float share = sigmoid(p.use_vu && slot < K ? lead : -lead);
        u[g * columns + c] = u[g * columns + c] * (static_cast<float>(p.scaling) * share * my_gates[slot]);
      }
      __syncwarp();  // the next instance's routes take the place of these
    }
    __syncthreads();
    auto y = global<T>(p.y);
    for (int item = threadIdx.x; item < count * outputs; item += kThreads) {
      const int g = item / outputs;
      const int64_t output = first_output + item % outputs;
      const int64_t at = (begin + g) * p.k + output;
      float sum = p.add ? to_float(y[at]) : 0.0f;
      for (int slot = 0; slot < slots; ++slot) {
        const Weight& B = p.use_vu && slot < K ? p.vu_B : p.if_B;
        const int64_t source = (experts[g * slots + slot] * p.k + output) * r;
        const Ptr<const float> with = u + (g * columns + slot * r);
        switch (B.dtype) {
          case kFloat32: sum = add_row<T>(sum, global<const float>(B.data) + source, with, r, aligned); break;
          case kFloat16: sum = add_row<T>(sum, global<const fp16>(B.data) + source, with, r, aligned); break;
          case kBfloat16: sum = add_row<T>(sum, global<const bf16>(B.data) + source, with, r, aligned); break;
          default:
            for (int rank = 0; rank < r; ++rank) sum += rounded<T>(weight_at(B, source + rank)) * with[rank];
        }
      }
      y[at] = from_float<T>(sum);
    }
    __syncthreads();
  }
}

size_t shared_bytes(const Decode& p) {
  const int64_t slots = (p.use_vu + p.use_if) * p.K, columns = slots * p.r;
  const int64_t group = std::max<int64_t>(1, std::min(p.n, kMixed / (columns + slots))), E = p.M + p.N;
  const int64_t sizes[] = {kThreads * 4, E * p.r, kWarps * E, kWarps * slots, kWarps * slots, group * slots,
                           group * columns, 2 * E};
  size_t bytes = 0;
  for (int64_t size : sizes) bytes += cdiv(size * 4, 16) * 16;
  return bytes;
}

}  // namespace

void decode(const Decode* projections, int count) {
  if (count < 1 || count > limits::kDecodeProjections) {
    throw std::invalid_argument("decode takes 1 to " + std::to_string(limits::kDecodeProjections) +
                                " projections, got " + std::to_string(count));
  }
  const Decode& first = projections[0];
  use_device(static_cast<int>(first.device));
  with_dtype(first.dtype, [&](auto zero) {
    const auto kernel = decode_kernel<decltype(zero)>;
    Projections all;
    size_t shared = 0;
    int64_t wanted[limits::kDecodeProjections], total = 0;
    for (int i = 0; i < count; ++i) {
      const Decode& p = all.of[i] = projections[i];
      shared = std::max(shared, shared_bytes(p));
      wanted[i] = std::max(Items(p).total(), cdiv(p.k, 32));
      total += wanted[i];
    }
    const int64_t blocks = std::min<int64_t>(resident_blocks("decode", kernel, kThreads, shared), total);
    if (blocks < count) throw std::runtime_error("decode: the device has no room for a block a projection at a time");
    for (int i = 0; i < count; ++i) {  // a block each, and of the others as many as it has of the work that is left
      const int64_t more = total > count ? (blocks - count) * (wanted[i] - 1) / (total - count) : 0;
      all.first_block[i + 1] = all.first_block[i] + static_cast<int>(1 + more);
    }
    launch("decode", kernel, dim3(static_cast<unsigned>(all.first_block[count])), kThreads, shared, first.stream, true,
           all);
  });
}
