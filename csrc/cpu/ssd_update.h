// A step of the state-space recurrence in place: what the kernel reads and writes.  Free of torch.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/rows.h"

namespace mmkernels {

// A strided view; strides are in elements and may be 0.  `storage` may differ from that of x.
struct SsdVector {
  const void* data = nullptr;
  Storage storage = Storage::f32;
  int64_t row = 0, token = 0, head = 0, item = 0;
};

struct SsdUpdate {
  Storage storage, state_storage;  // of x, y, z, B, C; of the states: f64 only together
  int64_t batch, tokens, heads, headdim, groups, dstate;
  bool softplus;
  double low, high;        // limits of the step size
  SsdVector x, z, B, C;    // (row, token, head or group, item); z.data null: no gate
  SsdVector dt;            // (row, token, head)
  SsdVector A, dt_bias;    // (head); dt_bias.data null: none
  SsdVector D;             // (head, item); data null: none
  void* y;                 // (batch, tokens, heads, headdim), dense
  void* state;             // (slot, head, headdim, dstate), the last dimension dense
  int64_t state_slot, state_head, state_row;
  const int64_t* slots;    // of each row, negative: padding; null: row i has slot i
};

MMK_KERNEL(ssd_update, SsdUpdate)

}  // namespace mmkernels
