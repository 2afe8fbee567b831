// Copies boxes of tensors, sums their fingerprints, or both, in one launch over a table of items.
//
// An item is `rows` runs of `row_bytes` contiguous bytes each, as written. Source and destination have their own pitch.
// Addresses are relative to bases, which change from launch to launch (a parameter that was reallocated, a slot), so
// the table itself never changes. Fingerprints are those of weightsync/fingerprint.py.
//
// One block works on an item. A thread takes sixteen bytes at a time if all addresses allow, else the largest power of
// two that divides them. A coefficient takes as long to compute as memory takes to bring its bytes, so it is computed
// once for all rows if possible. NVRTC compiles this file; for tests without a GPU, a C++ compiler does.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct Item {
  u64 src, dst;                // bytes from their bases
  u64 col;                     // bytes of the tensor's row before the first run
  i64 src_pitch, dst_pitch;    // bytes from run to run
  i64 col_step;
  u32 src_base, dst_base;      // index in `bases`; SLOT: the slot
  u32 row_bytes, rows;
  u32 row, row_step;           // the first run's row of the tensor; rows from run to run
  u32 total;                   // index in `totals`
  u32 op;
};

enum : u32 { SLOT = 0xffffffffu };
enum : u32 { COPY = 1, SUM = 2 };                 // bits of `mode`
enum : u32 { BYTES = 0, F32_TO_BF16 = 1 };        // `Item::op`

struct alignas(16) Vec { u32 x, y, z, w; };

static __device__ u64 splitmix(u64 i) {
  u64 z = (i + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

static __device__ u64 column(u64 word) { return splitmix(word) | 1; }
static __device__ u64 line(u64 row) { return splitmix((1ull << 63) + row) | 1; }

// Rounds as torch does on a GPU: to nearest even, and every NaN to 0x7fff.
static __device__ u32 bf16(u32 bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

static __device__ Vec take(const Item& it, const u8* src) {
  if (it.op == BYTES) return *(const Vec*)src;
  Vec a = ((const Vec*)src)[0], b = ((const Vec*)src)[1];
  Vec out;
  out.x = bf16(a.x) | bf16(a.y) << 16;
  out.y = bf16(a.z) | bf16(a.w) << 16;
  out.z = bf16(b.x) | bf16(b.y) << 16;
  out.w = bf16(b.z) | bf16(b.w) << 16;
  return out;
}

static __device__ u64 low(const Vec& data) { return data.x | (u64)data.y << 32; }
static __device__ u64 high(const Vec& data) { return data.z | (u64)data.w << 32; }

// Many rows at the same columns: each thread goes down its own columns.
static __device__ u64 tall(const Item& it, const u8* src, u8* dst, u32 mode, u32 across, u32 down) {
  const u32 vectors = it.row_bytes >> 4, scale = it.op == BYTES ? 4 : 5;
  const u32 first = threadIdx.x / across;
  if (first >= down) return 0;
  u64 sum = 0;
  for (u32 v = threadIdx.x - first * across; v < vectors; v += across) {
    u64 even = 0, odd = 0;
    for (u32 top = first; top < it.rows; top += 4 * down) {
      Vec data[4];
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        const u32 r = top + j * down;
        if (r >= it.rows) break;
        data[j] = take(it, src + (i64)r * it.src_pitch + ((u64)v << scale));
      }
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        const u32 r = top + j * down;
        if (r >= it.rows) break;
        if (mode & COPY) *(Vec*)(dst + (i64)r * it.dst_pitch + ((u64)v << 4)) = data[j];
        const u64 weight = line(it.row + (u64)r * it.row_step);
        even += weight * low(data[j]);
        odd += weight * high(data[j]);
      }
    }
    const u64 word = (it.col >> 3) + 2 * v;
    sum += column(word) * even + column(word + 1) * odd;
  }
  return sum;
}

static __device__ u64 wide(const Item& it, const u8* src, u8* dst, u32 mode) {
  const u32 vectors = it.row_bytes >> 4, all = vectors * it.rows, scale = it.op == BYTES ? 4 : 5;
  const u32 across = vectors < blockDim.x ? vectors : blockDim.x, down = blockDim.x / across;
  if (mode & SUM && !it.col_step && it.rows >= 4 * down) return tall(it, src, dst, mode, across, down);
  u64 sum = 0;
  for (u32 first = threadIdx.x; first < all; first += 4 * blockDim.x) {
    Vec data[4];
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
      const u32 k = first + j * blockDim.x;
      if (k >= all) break;
      const u32 r = k / vectors, v = k - r * vectors;
      data[j] = take(it, src + (i64)r * it.src_pitch + ((u64)v << scale));
    }
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
      const u32 k = first + j * blockDim.x;
      if (k >= all) break;
      const u32 r = k / vectors, v = k - r * vectors;
      if (mode & COPY) *(Vec*)(dst + (i64)r * it.dst_pitch + ((u64)v << 4)) = data[j];
      if (mode & SUM) {
        const u64 word = ((it.col + (i64)r * it.col_step) >> 3) + 2 * v;
        sum += (column(word) * low(data[j]) + column(word + 1) * high(data[j])) * line(it.row + (u64)r * it.row_step);
      }
    }
  }
  return sum;
}

template <typename Unit>
static __device__ u64 narrow(const Item& it, const u8* src, u8* dst, u32 mode) {
  const u32 units = it.row_bytes / sizeof(Unit), all = units * it.rows;
  u64 sum = 0;
  for (u32 k = threadIdx.x; k < all; k += blockDim.x) {
    const u32 r = k / units, v = k - r * units;
    const u8* from = src + (i64)r * it.src_pitch;
    Unit value;
    if (it.op == BYTES) value = ((const Unit*)from)[v];
    else value = (Unit)bf16(((const u32*)from)[v]);  // the unit is always two bytes here
    if (mode & COPY) ((Unit*)(dst + (i64)r * it.dst_pitch))[v] = value;
    if (mode & SUM) {
      const u64 at = it.col + (i64)r * it.col_step + (u64)v * sizeof(Unit);
      sum += column(at >> 3) * ((u64)value << (8 * (at & 7))) * line(it.row + (u64)r * it.row_step);
    }
  }
  return sum;
}

static __device__ u64 work(const Item& it, const u8* src, u8* dst, u32 mode) {
  const u32 addresses = (u32)(u64)src | (u32)it.src_pitch | it.row_bytes |
                        (mode & COPY ? (u32)(u64)dst | (u32)it.dst_pitch : 0u);
  const u32 words = mode & SUM ? (u32)it.col | (u32)it.col_step : 0u;
  if (!(addresses & 15) && !(words & 7)) return wide(it, src, dst, mode);
  if (it.op != BYTES) return narrow<u16>(it, src, dst, mode);
  const u32 bits = addresses | words;
  if (!(bits & 7)) return narrow<u64>(it, src, dst, mode);
  if (!(bits & 3)) return narrow<u32>(it, src, dst, mode);
  if (!(bits & 1)) return narrow<u16>(it, src, dst, mode);
  return narrow<u8>(it, src, dst, mode);
}

extern "C" __global__ void __launch_bounds__(512, 2) boxes(
    const Item* items, u32 count, const u64* bases, u64 slot, u64* totals, u32 mode) {
  for (u32 i = blockIdx.x; i < count; i += gridDim.x) {
    const Item it = items[i];
    const u8* src = (const u8*)((it.src_base == SLOT ? slot : bases[it.src_base]) + it.src);
    u8* dst = mode & COPY ? (u8*)((it.dst_base == SLOT ? slot : bases[it.dst_base]) + it.dst) : 0;
    u64 sum = work(it, src, dst, mode);
    if (mode & SUM) {
#ifdef __CUDACC__
      for (u32 lane = 16; lane; lane >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, lane);
      if ((threadIdx.x & 31) == 0 && sum) atomicAdd(totals + it.total, sum);
#else
      totals[it.total] += sum;
#endif
    }
  }
}
