// All kernels for one instruction set; compiled once for each with -DISA=<name>.
#include "causal_conv1d_kernel.h"
#include "selective_scan_kernel.h"

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)

namespace ssmvision {

extern const Kernels CONCAT(kernels_, ISA) = {STRING(ISA), scan_forward, scan_backward, conv_forward, conv_backward};

}  // namespace ssmvision
