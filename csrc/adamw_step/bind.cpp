// Python signature of the adamw_step kernel; Python has checked shapes, dtypes and strides.
#include "common/bind.h"

#include "adamw_step/adamw_step.h"
#include "common/pointer.h"

namespace m4k {
namespace {

void step(uintptr_t table, uintptr_t grad_factor, uintptr_t found_inf, uintptr_t lr, int64_t tensors, double beta1,
          double beta2, double eps, double weight_decay, int threads) {
    adamw_step(AdamWArgs{as_ptr<const int64_t>(table), as_ptr<const float>(grad_factor), as_ptr<const float>(found_inf),
                         tensors, *as_ptr<const double>(lr), beta1, beta2, eps, weight_decay, threads});
}

}  // namespace

void bind_adamw_step(py::module_& m) {
    def_by_name<&step, "table", "grad_factor", "found_inf", "lr", "tensors", "beta1", "beta2", "eps", "weight_decay",
                "threads">(m, "adamw_step_f32");
}

}  // namespace m4k
