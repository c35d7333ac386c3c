// The recurrent step's kernel without torch (alone.h): storage types of x and the state, odd sizes, one and two tokens.
#include "alone.h"
#include "cpu/ssd_update.h"

namespace {

void update(Storage storage, Storage state_storage, int64_t headdim, int64_t dstate, int64_t tokens) {
  constexpr int64_t rows = 3, heads = 4, groups = 2;
  const int64_t items = rows * tokens * heads * headdim;
  const auto x = values(storage, items), z = values(storage, items), D = values(storage, heads * headdim);
  const auto B = values(storage, rows * tokens * groups * dstate), C = B;
  const auto dt = values(storage, rows * tokens * heads), bias = values(storage, heads), A = bias;
  auto y = unwritten(storage, items), state = values(state_storage, 2 * heads * headdim * dstate);
  const int64_t slots[rows] = {1, -1, 0};
  const auto view = [&](const std::vector<unsigned char>& memory, int64_t count, int64_t size) {
    SsdVector made;
    made.data = memory.data();
    made.storage = storage;
    made.row = tokens * count * size;
    made.token = count * size;
    made.head = size;
    made.item = 1;
    return made;
  };
  SsdUpdate u;
  u.storage = storage;
  u.state_storage = state_storage;
  u.batch = rows;
  u.tokens = tokens;
  u.heads = heads;
  u.headdim = headdim;
  u.groups = groups;
  u.dstate = dstate;
  u.softplus = true;
  u.low = 0.0;
  u.high = 0.25;
  u.x = view(x, heads, headdim);
  u.z = view(z, heads, headdim);
  u.B = view(B, groups, dstate);
  u.C = view(C, groups, dstate);
  u.dt = view(dt, heads, 1);
  u.A = view(A, heads, 1);
  u.dt_bias = view(bias, heads, 1);
  u.D = view(D, heads, headdim);
  u.y = y.data();
  u.state = state.data();
  u.state_slot = heads * headdim * dstate;
  u.state_head = headdim * dstate;
  u.state_row = dstate;
  u.slots = slots;
  ssd_update(u);
  require_numbers("y", storage, y);
  require_numbers("state", state_storage, state);
}

}  // namespace

int main(int, char** arguments) {
  use_level(arguments[1]);
  for (Storage storage : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
    for (Storage states : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
      if ((states == Storage::f64) != (storage == Storage::f64)) continue;
      for (int64_t size : {1, 4, 7, 37}) {
        update(storage, states, size, size, 1);
        update(storage, states, size + 2, size, 2);
      }
    }
  }
  std::puts("ok");
  return 0;
}
