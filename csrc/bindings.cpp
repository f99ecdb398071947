// The Python module. Each pass takes a dict with the fields of its params struct: numbers, (address, dtype) for a
// tensor, and a list of dicts for the banks.

#include <pybind11/pybind11.h>

#include <iterator>
#include <type_traits>
#include <vector>

#include "params.h"

#ifndef SMOLORA_EMULATE
#include <cuda_runtime.h>

#include "architectures.h"  // written by setup.py
#endif

namespace py = pybind11;

namespace {

template <class P>
P parsed(const py::dict& values);

// The fields of a struct in a dict, taken one after another.
class Fields {
 public:
  explicit Fields(const py::dict& values) : values_(values) {}

  template <class V>
  void take(const char* name, V& field) {
    if (!values_.contains(name)) return;
    ++found_;
    const py::handle value = values_[name];
    if constexpr (std::is_array_v<V>) {
      const auto items = value.cast<py::list>();
      if (items.size() > std::size(field)) {
        throw py::value_error(std::string(name) + " must be at most " + std::to_string(std::size(field)) + ", got " +
                              std::to_string(items.size()));
      }
      for (size_t i = 0; i < items.size(); ++i) field[i] = parsed<std::remove_extent_t<V>>(items[i].cast<py::dict>());
    } else if constexpr (std::is_same_v<V, Weight> || std::is_pointer_v<V>) {
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

#define TAKE_FIELD(type, name, value) fields.take(#name, p.name);

void take(Fields& fields, Bank& p) { BANK_FIELDS(TAKE_FIELD) }
void take(Fields& fields, Pass& p) {
  LAYOUT_FIELDS(TAKE_FIELD)
  fields.take("banks", p.banks);
}
void take(Fields& fields, Decode& p) {
  take(fields, static_cast<Pass&>(p));
  DECODE_FIELDS(TAKE_FIELD)
}
void take(Fields& fields, RouteShrink& p) {
  take(fields, static_cast<Pass&>(p));
  ROUTE_SHRINK_FIELDS(TAKE_FIELD)
}
void take(Fields& fields, FuseExpand& p) {
  take(fields, static_cast<Pass&>(p));
  FUSE_EXPAND_FIELDS(TAKE_FIELD)
}
void take(Fields& fields, GradOutput& p) {
  take(fields, static_cast<Pass&>(p));
  GRAD_OUTPUT_FIELDS(TAKE_FIELD)
}
void take(Fields& fields, GradInput& p) {
  take(fields, static_cast<Pass&>(p));
  GRAD_INPUT_FIELDS(TAKE_FIELD)
}

template <class P>
P parsed(const py::dict& values) {
  P p;
  Fields fields(values);
  take(fields, p);
  fields.finish();
  return p;
}

template <class P>
void define(py::module_& m, const char* name, void (*pass)(const P&)) {
  m.def(name, [pass](const py::dict& values) { pass(parsed<P>(values)); });
}

}  // namespace

PYBIND11_MODULE(SMOLORA_MODULE, m) {
  m.doc() = "The passes in CUDA C++; smolora.engine.cuda_passes calls them.";
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
  limit("BANKS", limits::kBanks);
  limit("DECODE_INPUTS", limits::kDecodeInputs);
  limit("DECODE_WEIGHTS", limits::kDecodeWeights);
  limit("DECODE_MIXED", limits::kDecodeMixed);
  limit("DECODE_ROUTES", limits::kDecodeRoutes);
  limit("DECODE_PROJECTIONS", limits::kDecodeProjections);
  limit("TILE", limits::kTile);
  limit("MIX_TILE", limits::kMixTile);
  limit("ROUTE_INPUTS", limits::kRouteInputs);
  limit("W_PART_OUTPUTS", limits::kWPartOutputs);
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
