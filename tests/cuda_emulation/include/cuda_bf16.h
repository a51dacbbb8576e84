#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

using __nv_bfloat16 = c10::BFloat16;
using __half = c10::Half;
