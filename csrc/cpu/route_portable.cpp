#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define MOE_ROUTING_ISA portable
#include "thread_row.h"
