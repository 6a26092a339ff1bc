#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// Standard headers stay above: their inline functions are shared with code for older processors.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi,bmi2,popcnt")
#pragma GCC target("prefer-vector-width=512")
#define MOE_ROUTING_ISA avx512
#include "thread_row.h"
#endif
