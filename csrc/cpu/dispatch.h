// Which compiled copy of the kernels runs. Every kernel_*.cpp is compiled once per capability and fills in its entries.
#pragma once

#include "problem.h"

#define LOMIX_CONCAT_(a, b) a##b
#define LOMIX_CONCAT(a, b) LOMIX_CONCAT_(a, b)
#ifdef CPU_CAPABILITY
#define LOMIX_FORWARD_TABLE LOMIX_CONCAT(fill_forward_, CPU_CAPABILITY)
#define LOMIX_BACKWARD_TABLE LOMIX_CONCAT(fill_backward_, CPU_CAPABILITY)
#endif

namespace lomix::cpu {

void fill_forward_DEFAULT(Kernels<float>&, Kernels<double>&);
void fill_backward_DEFAULT(Kernels<float>&, Kernels<double>&);
void fill_forward_AVX2(Kernels<float>&, Kernels<double>&);
void fill_backward_AVX2(Kernels<float>&, Kernels<double>&);
void fill_forward_AVX512(Kernels<float>&, Kernels<double>&);
void fill_backward_AVX512(Kernels<float>&, Kernels<double>&);

// The capability in use: "AVX512", "AVX2" or "DEFAULT". The best one that was built and that this CPU has, unless the
// environment variable LOMIX_FAST_CPU_CAPABILITY names a lower one. Decided once, at the first call.
const char* capability();

template <typename T>
const Kernels<T>& kernels();

}  // namespace lomix::cpu
