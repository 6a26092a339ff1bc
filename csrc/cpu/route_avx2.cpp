#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// Standard headers stay above: their inline functions are shared with code for older processors.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt")
#define MOE_ROUTING_ISA avx2
#include "thread_row.h"
#endif
