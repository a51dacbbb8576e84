#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace peft_ext {

// The handle of an op, to be kept in a static.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace peft_ext
