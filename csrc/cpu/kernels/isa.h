// The build compiles every kernel unit once per instruction set with -DPEFT_EXT_ISA=<name>; a unit puts
// its exported table into the namespace of that name.
#pragma once

namespace peft_ext {

// How a tensor's elements are stored.
enum class Storage { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kNumStorages = 4;

}  // namespace peft_ext
