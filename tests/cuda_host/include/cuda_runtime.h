// Host execution: the part of CUDA's interface that csrc/cuda uses, for a plain C++20 compiler. Kernels run on the CPU
// under machine.cpp, so that AddressSanitizer and UndefinedBehaviorSanitizer can watch them. What the sources do not
// use is left out on purpose: a new need shows up as a compile error, not as a behaviour that nobody looked at.
#pragma once

#include "cuda_host/arithmetic.h"
#include "cuda_host/launch.h"
#include "cuda_host/threads.h"
#include "cuda_host/types.h"
