// The module: a function a pass, which takes a dict of the fields of its params struct: numbers, and for a tensor its
// address and dtype.

#include <pybind11/pybind11.h>

#include <type_traits>
#include <vector>

#include "smolora.h"

#ifndef SMOLORA_EMULATE
#include <cuda_runtime.h>

#include "architectures.h"  // written by setup.py
#endif

namespace py = pybind11;

namespace {

// Reads a field from a dict, if it is there, and counts it.
class Fields {
 public:
  explicit Fields(const py::dict& values) : values_(values) {}

  template <class V>
  void operator()(const char* name, V& field) {
    if (!values_.contains(name)) return;
    ++found_;
    const py::handle value = values_[name];
    if constexpr (std::is_same_v<V, Weight> || std::is_pointer_v<V>) {
      const auto [address, dtype] = value.cast<std::pair<uintptr_t, int64_t>>();
      if constexpr (std::is_pointer_v<V>) {
        field = reinterpret_cast<V>(address);
      } else if (dtype == kOther) {
        throw py::type_error(std::string(name) + " must be float32, float16, bfloat16 or float64");
      } else {
        field = {reinterpret_cast<const void*>(address), dtype};
      }
    } else {
      field = value.cast<V>();
    }
  }
  void finish() const {
    if (found_ != values_.size()) throw py::type_error("unknown field among " + std::string(py::repr(values_)));
  }

 private:
  const py::dict& values_;
  size_t found_ = 0;
};

#define FIELD(name) fields(#name, p.name)

void read(Fields& fields, Layout& p) {
  FIELD(device), FIELD(stream), FIELD(dtype), FIELD(T), FIELD(n), FIELD(K), FIELD(r), FIELD(M), FIELD(N);
  FIELD(use_vu), FIELD(use_if), FIELD(adaptive), FIELD(fixed_lead), FIELD(scaling), FIELD(cu), FIELD(seed);
  FIELD(threshold);
}
void read(Fields& fields, Decode& p) {
  FIELD(d), FIELD(k), FIELD(e), FIELD(route), FIELD(add), FIELD(outputs), FIELD(x), FIELD(mask), FIELD(instruction);
  FIELD(vu_A), FIELD(if_A), FIELD(vu_B), FIELD(if_B), FIELD(vu_router), FIELD(if_router), FIELD(vu_importance);
  FIELD(if_importance), FIELD(given_routes), FIELD(given_gates), FIELD(routes), FIELD(gates), FIELD(logits);
  FIELD(lead), FIELD(y), FIELD(h_part), FIELD(z_part), FIELD(z_if), FIELD(w_part);
}
void read(Fields& fields, RouteShrink& p) {
  FIELD(d), FIELD(k), FIELD(e), FIELD(route), FIELD(one_pass), FIELD(columns), FIELD(splits), FIELD(sum_splits);
  FIELD(x), FIELD(mask), FIELD(instruction), FIELD(vu_A), FIELD(if_A), FIELD(vu_B), FIELD(if_B), FIELD(vu_router);
  FIELD(if_router), FIELD(vu_importance), FIELD(if_importance), FIELD(vu_packed), FIELD(if_packed), FIELD(routes);
  FIELD(gates), FIELD(logits), FIELD(routed), FIELD(arrived), FIELD(sums), FIELD(mean), FIELD(z_part);
  FIELD(w_part), FIELD(part), FIELD(h), FIELD(w);
}
void read(Fields& fields, FuseExpand& p) {
  FIELD(k), FIELD(splits), FIELD(h), FIELD(w), FIELD(routes), FIELD(gates), FIELD(vu_B), FIELD(if_B), FIELD(bias);
  FIELD(vu_packed), FIELD(if_packed), FIELD(u), FIELD(lead), FIELD(y);
}
void read(Fields& fields, GradOutput& p) {
  FIELD(k), FIELD(need_p), FIELD(need_c), FIELD(need_gates), FIELD(need_vu_B), FIELD(need_if_B);
  FIELD(need_importance), FIELD(one_read), FIELD(columns), FIELD(parts), FIELD(chunk), FIELD(chunks), FIELD(g);
  FIELD(h), FIELD(w), FIELD(routes), FIELD(gates), FIELD(lead), FIELD(vu_B), FIELD(if_B), FIELD(vu_importance);
  FIELD(if_importance), FIELD(vu_packed), FIELD(if_packed), FIELD(u), FIELD(p_part), FIELD(B_part);
  FIELD(chunk_owner), FIELD(c_part), FIELD(q_part), FIELD(tile_owner), FIELD(c), FIELD(dh), FIELD(dvu_B);
  FIELD(dif_B), FIELD(dvu_importance), FIELD(dif_importance), FIELD(dgates);
}
void read(Fields& fields, GradInput& p) {
  FIELD(d), FIELD(need_dx), FIELD(need_vu_A), FIELD(need_if_A), FIELD(splits), FIELD(chunk), FIELD(chunks), FIELD(x);
  FIELD(dh), FIELD(routes), FIELD(mask), FIELD(dmean), FIELD(vu_A), FIELD(if_A), FIELD(vu_packed), FIELD(if_packed);
  FIELD(u), FIELD(A_part), FIELD(chunk_owner), FIELD(dx), FIELD(dvu_A), FIELD(dif_A);
}

template <class P>
P parsed(const py::dict& values) {
  P p;
  Fields fields(values);
  read(fields, static_cast<Layout&>(p));
  read(fields, p);
  fields.finish();
  return p;
}

template <class P>
void define(py::module_& m, const char* name, void (*pass)(const P&)) {
  m.def(name, [pass](const py::dict& values) { pass(parsed<P>(values)); });
}

}  // namespace

PYBIND11_MODULE(SMOLORA_MODULE, m) {
  m.doc() = "SMoLoRA's passes in CUDA C++; smolora.cuda calls them.";
  m.def("decode", [](const py::args& all) {  // a dict a projection
    std::vector<Decode> projections;
    for (const py::handle values : all) projections.push_back(parsed<Decode>(values.cast<py::dict>()));
    decode(projections.data(), static_cast<int>(projections.size()));
  });
  define<RouteShrink>(m, "route_shrink", route_shrink);
  define<FuseExpand>(m, "fuse_expand", fuse_expand);
  define<GradOutput>(m, "grad_output", grad_output);
  define<GradInput>(m, "grad_input", grad_input);
  const auto limit = [&m](const char* name, int value) { m.attr(name) = value; };
  limit("DECODE_INPUTS", limits::kDecodeInputs);
  limit("DECODE_WEIGHTS", limits::kDecodeWeights);
  limit("DECODE_MIXED", limits::kDecodeMixed);
  limit("DECODE_ROUTES", limits::kDecodeRoutes);
  limit("DECODE_PROJECTIONS", limits::kDecodeProjections);
  limit("TILE", limits::kTile);
  limit("MIX_TILE", limits::kMixTile);
  limit("ROUTE_INPUTS", limits::kRouteInputs);
  limit("PREPARE_OUTPUTS", limits::kPrepareOutputs);
  limit("CHUNK", limits::kChunk);
  limit("ROW", limits::kRow);
  limit("OUTER_TILES", limits::kOuterTiles);
#ifdef SMOLORA_EMULATE
  m.attr("emulated") = true;
  m.def("allow", [](uintptr_t address, size_t bytes) { emulate_allow(address, bytes); });
  m.def("forget", [] { emulate_forget(); });
  m.def("set_order", [](bool reversed) { emulate_order(reversed); });
  m.def("leave_out", [](const std::string& file, int line) { emulate_leave_out(file, line); });
  m.def("self_test", [](int which) { emulate_self_test(which); });
#else
  m.attr("emulated") = false;
  m.attr("architectures") = SMOLORA_ARCHITECTURES;
  m.attr("runtime_version") = CUDART_VERSION;
  m.def("driver_version", [] {
    int version = 0;  // stays 0 where there is no driver
    cudaDriverGetVersion(&version);
    return version;
  });
#endif
}
