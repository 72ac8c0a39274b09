// What n_m.cpp is called with. fxsparse/kernels/cpu/n_m.py passes these numbers too.

#pragma once

#include <cstdint>

namespace n_m {

// All sizes in elements; see fxsparse/formats/n_m.py for what the arrays hold. Checked there, not here.
struct Problem {
    int64_t tokens, rows, columns, n, threads;
};

}  // namespace n_m
