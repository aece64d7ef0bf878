// Chooses the compiled copy of the kernels that fits this CPU.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace lomix::cpu {
namespace {

struct Choice {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

bool has_avx2() {
#if defined(LOMIX_HAVE_AVX2)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(LOMIX_HAVE_AVX512)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

const char* decide() {
  const char* best = has_avx512() ? "AVX512" : has_avx2() ? "AVX2" : "DEFAULT";
  const char* forced = std::getenv("LOMIX_FAST_CPU_CAPABILITY");
  if (forced == nullptr || *forced == '\0') return best;
  for (const char* name : {"DEFAULT", "AVX2", "AVX512"}) {
    if (std::strcmp(forced, name) == 0) {
      const bool usable = std::strcmp(name, "DEFAULT") == 0 || (std::strcmp(name, "AVX2") == 0 && has_avx2()) ||
                          (std::strcmp(name, "AVX512") == 0 && has_avx512());
      if (usable) return name;
    }
  }
  throw std::invalid_argument(
      std::string("LOMIX_FAST_CPU_CAPABILITY: got '") + forced +
      "', expected DEFAULT, AVX2 or AVX512 as far as this CPU and this build have it (best: " + best + ")");
}

Choice make_choice() {
  Choice choice{};
  choice.name = decide();
  const auto is = [&](const char* name) { return std::strcmp(choice.name, name) == 0; };
  if (is("DEFAULT")) {
    fill_forward_DEFAULT(choice.f32, choice.f64);
    fill_backward_DEFAULT(choice.f32, choice.f64);
  }
#if defined(LOMIX_HAVE_AVX2)
  if (is("AVX2")) {
    fill_forward_AVX2(choice.f32, choice.f64);
    fill_backward_AVX2(choice.f32, choice.f64);
  }
#endif
#if defined(LOMIX_HAVE_AVX512)
  if (is("AVX512")) {
    fill_forward_AVX512(choice.f32, choice.f64);
    fill_backward_AVX512(choice.f32, choice.f64);
  }
#endif
  return choice;
}

const Choice& choice() {
  static const Choice made = make_choice();
  return made;
}

}  // namespace

const char* capability() { return choice().name; }

template <>
const Kernels<float>& kernels<float>() {
  return choice().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return choice().f64;
}

}  // namespace lomix::cpu
