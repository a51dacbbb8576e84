#pragma once

namespace peft_ext {

// Of the bottleneck adapter; kernels of every device know them by these.
enum class Activation { kRelu, kGelu, kGeluNew, kSilu, kTanh };

}  // namespace peft_ext
