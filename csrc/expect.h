// Asserts preconditions in sanitizer builds, and does nothing in other builds.
#pragma once

#if defined(NAMERNN_FAST_SANITIZE)
#include <cassert>
#define NAMERNN_EXPECT(condition) assert(condition)
#else
#define NAMERNN_EXPECT(condition)
#endif
