// The kernels of nbsoftmax/cuda/_kernels.py written by hand: ours are measured against them.
//
// The arithmetic is that of nbsoftmax/_scalars.py, function by function, and explained there; the
// tiles are the same, and the order in which numbers meet. The rest is what a careful writer gives
// the compiler: 32-bit indices within a lane, offsets known when compiled, fmax, a branch around
// what is rare. To be compiled with -fmad=false: where a product is fused with a sum it says so.
//
// nvcc_table.py writes constants.h, names the kernels, and compiles this for the host as well, where
// its results can be checked without a device.

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#define BOTH __host__ __device__ __forceinline__
#else
#include <atomic>
#include <barrier>
#include <thread>
#include <vector>

// On the host the threads of a block are threads that meet at a barrier for every exchange.
#define BOTH inline
#define __shared__ static
inline thread_local int me;
inline std::barrier<>* gate;
inline void __syncthreads() { gate->arrive_and_wait(); }
inline int __syncthreads_or(int flag) {
    static std::atomic<int> any;
    any = 0;
    __syncthreads();
    if (flag) any = 1;
    __syncthreads();
    return any;
}
inline int __any_sync(unsigned, int flag) { return __syncthreads_or(flag); }
template <class R> R __shfl_xor_sync(unsigned, R value, int step) {
    static R passed[1024];
    passed[me] = value;
    __syncthreads();
    R got = passed[me ^ step];
    __syncthreads();
    return got;
}
template <class Kernel> void launch(int threads, unsigned blocks, Kernel kernel) {
    std::barrier<> all(threads);
    gate = &all;
    std::vector<std::jthread> running;
    for (int thread = 0; thread < threads; thread++)
        running.emplace_back([=] {
            me = thread;
            for (unsigned block = 0; block < blocks; block++) {
                kernel(thread, block);
                __syncthreads();
            }
        });
}
struct uint4 { unsigned x, y, z, w; };
#endif

#include "constants.h"

#define UNROLLED _Pragma("unroll") for  // its numbers live in registers

enum Op { SOFTMAX, LOG_SOFTMAX, LOGSUMEXP };

// -- operations of one number --------------------------------------------------------------------

template <class To, class From> BOTH To bits_as(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

BOTH float fused(float a, float b, float c) { return fmaf(a, b, c); }
BOTH double fused(double a, double b, double c) { return fma(a, b, c); }
BOTH float magnitude(float a) { return fabsf(a); }
BOTH double magnitude(double a) { return fabs(a); }

// Loses a NaN if it can.
BOTH float larger(float a, float b) { return fmaxf(a, b); }
BOTH double larger(double a, double b) { return a > b ? a : b; }

// Keeps a NaN in x; the instruction that does it came with sm_80.
template <class R> BOTH R at_least(R floor, R x) { return floor > x ? floor : x; }
#if __CUDA_ARCH__ >= 800
template <> BOTH float at_least(float floor, float x) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(floor), "f"(x));
    return y;
}
#endif

template <class R> BOTH R power_of_two(R t) {
    using Bits = typename Constants<R>::Bits;
    return bits_as<R>(bits_as<Bits>(t) << Constants<R>::mantissa);
}

// 0 instead of a subnormal number.
BOTH float exp2_of(float t) {
#ifdef __CUDA_ARCH__
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
    return power;
#else
    return exp2f(t);
#endif
}

// -- _scalars.py ---------------------------------------------------------------------------------

template <class R> struct Two { R high, low; };

template <class R> struct Scale {
    using C = Constants<R>;
    R shift, near, floor, magic;

    BOTH explicit Scale(R m) {
        if (m == -(R)INFINITY) m = 0;
        bool small = magnitude(m) < C::exact;
        shift = small ? 0 : m;
        near = small ? m : 0;
        R top = fused(near, C::log2e, C::round) - C::round;
        floor = (top - C::clamp) * C::ln2_hi;
        magic = C::origin - top;
    }

    // Where this does not hold, `shifted` is the identity.
    BOTH static bool shifts(R m) { return !(magnitude(m) < C::exact); }
    BOTH R shifted(R x, R m) const { return x == m ? near : x - shift; }

    BOTH R reduced(R x, R& q, R& r) const {
        R y = at_least(floor, x), t = fused(y, C::log2e, magic), k = t - magic;
        r = fused(k, -C::ln2_lo, fused(k, -C::ln2_hi, y));
        q = C::exp(C::exps - 1);
        UNROLLED (int i = C::exps - 2; i >= 0; i--) q = fused(q, r, C::exp(i));
        q = fused(q, r, (R)1);
        return power_of_two(t);
    }

    BOTH R exp(R x) const {
        if constexpr (!C::precise) return exp2_of(fused(x, C::log2e, magic));
        R p, power = exp_product(x, p);
        return p * power;
    }

    BOTH R exp_product(R x, R& p) const {
        R q, r, power = reduced(x, q, r);
        p = fused(q, r, (R)1);
        return power;
    }

    BOTH Two<R> exp_two_parts(R x, R low) const {
        if constexpr (!C::precise) return {exp(x), low};
        R q, r, power = reduced(x, q, r), p = fused(q, r, (R)1);
        return {p * power, fused(fused(q, r, 1 - p), power, low)};
    }
};

template <class R> BOTH Two<R> largest(R m) {
    Scale<R> by(m);
    return by.exp_two_parts(by.near, 0);
}

template <class R> BOTH Two<R> two_sum(R a, R b) {
    R t = a + b, other = t - a;
    return {t, (a - (t - other)) + (b - other)};
}

template <class R> BOTH void add(Two<R>& sum, R term) {
    Two<R> t = two_sum(sum.high, term);
    sum = {t.high, sum.low + t.low};
}

template <class R> BOTH void add_to_more(Two<R>& sum, R term) {
    R total = sum.high + term;
    sum = {total, sum.low + (term - (total - sum.high))};
}

template <class R> BOTH void add_exp(Two<R>& sum, R x, const Scale<R>& by) {
    if constexpr (!Constants<R>::precise) {
        sum.high += by.exp(x);
    } else {
        R p, power = by.exp_product(x, p), total = fused(p, power, sum.high);
        sum = {total, sum.low + fused(p, power, sum.high - total)};
    }
}

template <bool to_more, class R> BOTH void add_one(Two<R>& sum, R term) {
    if constexpr (!Constants<R>::precise)
        sum.high += term;
    else if constexpr (to_more)
        add_to_more(sum, term);
    else
        add(sum, term);
}

template <class R> BOTH Two<R> merge(Two<R> a, Two<R> b) {
    Two<R> t = two_sum(a.high, b.high);
    return {t.high, (a.low + b.low) + t.low};
}

template <class R> BOTH bool infinite(R m) { return magnitude(m) == (R)INFINITY; }
template <class R> BOTH bool without_terms(R m, R s) { return infinite(m) && s == s; }

// In two steps: the ratio may be smaller than any number, and its product with the sum not.
template <class R> BOTH Two<R> rescaled(R m, R whole, Two<R> sum) {
    using C = Constants<R>;
    Scale<R> own(m), by(whole);
    R k = larger((R)(2 * (1 - C::one_exponent)), by.magic - own.magic);
    R half = fused(k, (R)0.5, C::round) - C::round, zero_power = C::round + C::one_exponent;
    R first = power_of_two(half + zero_power), second = power_of_two((k - half) + zero_power);
    if (own.shifts(m) || by.shifts(whole)) {
        first = power_of_two(zero_power - C::bias);
        second = by.exp(m - by.shift) / (largest(m).high * first);
    }
    if (infinite(m) || infinite(whole)) second = 0;
    return {sum.high * first * second, sum.low * first * second};
}

template <class R> BOTH Two<R> with_equals(R m, R count, Two<R> sum) {
    Two<R> term = largest(m);
    R times = count - 1, product = times * term.high;
    R rest = fused(times, term.high, -product);
    Two<R> total = {product, fused(times, term.low, sum.low + rest)};
    add(total, sum.high);
    return without_terms(m, sum.high) ? Two<R>{0, 0} : total;
}

template <class R> BOTH Two<R> without_one(R m, Two<R> sum) {
    Two<R> rest = two_sum(sum.high, -largest(m).high);
    rest.low = sum.low + rest.low;
    return without_terms(m, sum.high) ? Two<R>{0, 0} : rest;
}

template <class R> BOTH bool is_small(R m, R s, int additions) {
    R least = Constants<R>::precise ? additions * additions * Constants<R>::unit : additions / (R)256;
    return !without_terms(m, s) && !(s > least * largest(m).high);
}

template <class R> BOTH Two<R> reciprocal(R m, Two<R> sum) {
    Two<R> total = two_sum(sum.high, sum.low);
    R high = 1 / total.high;
    R low = high * (fused(-high, total.high, (R)1) - high * total.low);
    return {infinite(m) ? (R)NAN : high, low};
}

template <class R> BOTH R softmax(R term, Two<R> inverse) {
    if constexpr (!Constants<R>::precise) return term * inverse.high;
    return fused(term, inverse.high, term * inverse.low);
}

template <class R> BOTH Two<R> log_parts(R k, R f, R rest, R& tail) {
    using C = Constants<R>;
    R half_square = (R)0.5 * f * f, z = f / (2 + f), square = z * z;
    tail = C::log(C::logs - 1);
    UNROLLED (int i = C::logs - 2; i >= 0; i--) tail = fused(tail, square, C::log(i));
    tail = z * fused(square, tail, half_square) + fused(k, C::ln2_rest, rest);
    tail = tail - half_square;
    return two_sum(k * C::ln2_short, f);
}

template <class R> BOTH R logsumexp_of_all(R m, Two<R> sum) {
    using C = Constants<R>;
    using Bits = typename C::Bits;
    Scale<R> by(m);
    R low = by.exp_two_parts(by.near, sum.low).low;
    R total = sum.high + low;
    low = low - (total - sum.high);
    Bits bits = bits_as<Bits>(total), whole = (bits - C::half_root) >> C::mantissa;
    R power = (R)whole, f = bits_as<R>(bits - (whole << C::mantissa)) - 1;
    R inverse = fused(f, f - 1, (R)1);
    R rest = low * power_of_two((C::round + C::one_exponent) - power) * inverse;
    R k = ((C::origin - C::bias) - by.magic) + power, tail;
    Two<R> log = log_parts(k, f, rest, tail);
    log.low = log.low + fused(k, C::ln2_short, -(k * C::ln2_short));
    return without_terms(m, sum.high) ? m : by.shift + (log.high + (log.low + tail));
}

template <class R> BOTH Two<R> log_sum(R m, Two<R> sum) {
    using C = Constants<R>;
    using Bits = typename C::Bits;
    // ratio_to_largest
    Two<R> term = largest(m);
    R y = sum.high / term.high;
    R y_low = ((fused(-y, term.high, sum.high) + sum.low) - y * term.low) / term.high;
    // log1p
    Two<R> u = two_sum((R)1, y);
    Bits bits = bits_as<Bits>(u.high), whole = (bits - C::half_root) >> C::mantissa;
    R k = (R)whole, fraction = bits_as<R>(bits - (whole << C::mantissa));
    bool near = whole == 0;
    R f = near ? y : fraction - 1;
    R rest = (u.low + y_low) * power_of_two((C::round + C::one_exponent) - k);
    rest = near ? y_low : rest;
    // _log
    R tail;
    Two<R> log = log_parts(k, f, rest / (1 + f), tail), all = two_sum(log.high, tail);
    return {m == (R)INFINITY ? (R)NAN : all.high, log.low + all.low};
}

template <class R> BOTH R logsumexp(R m, Two<R> sum) {
    Two<R> log = log_sum(m, sum), total = two_sum(m, log.high);
    return without_terms(m, sum.high) ? m : total.high + (total.low + log.low);
}

// -- memory --------------------------------------------------------------------------------------

struct bfloat16 { uint16_t bits; };
template <class E> struct Computed { using Type = E; };
template <> struct Computed<bfloat16> { using Type = float; };

// A vector of float or double is its numbers; bfloat16 are the upper halves of float.
template <class E, class R, int N> BOTH void unpack(uint4 held, R (&values)[N]) {
    if constexpr (sizeof(E) == sizeof(R)) {
        memcpy(values, &held, sizeof held);
    } else {
        const uint32_t words[4] = {held.x, held.y, held.z, held.w};
        UNROLLED (int i = 0; i < 4; i++) {
            values[2 * i] = bits_as<float>(words[i] << 16);
            values[2 * i + 1] = bits_as<float>(words[i] & 0xffff0000u);
        }
    }
}

BOTH uint32_t rounded_pair(float a, float b) {
#ifdef __CUDA_ARCH__
    return bits_as<uint32_t>(__floats2bfloat162_rn(a, b));
#else
    auto one = [](float v) {
        uint32_t bits = bits_as<uint32_t>(v);
        return v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0u;
    };
    return one(a) | one(b) << 16;
#endif
}

template <class E, class R, int N> BOTH uint4 pack(const R (&values)[N]) {
    uint32_t words[4];
    if constexpr (sizeof(E) == sizeof(R))
        memcpy(words, values, sizeof words);
    else
        UNROLLED (int i = 0; i < 4; i++)
            words[i] = rounded_pair(values[2 * i], values[2 * i + 1]);
    return {words[0], words[1], words[2], words[3]};
}

// -- threads that share lanes --------------------------------------------------------------------

constexpr int WARP = 32;
constexpr int smaller_of(int a, int b) { return a < b ? a : b; }
constexpr int bit_length(int a) { return a ? 1 + bit_length(a / 2) : 0; }

// Of neighbours, and then of threads behind each other along the lane; so many groups to a block.
template <int Across, int Deep, int Together> struct Group {
    static constexpr int threads = Across * Deep, block = threads * Together;
    static constexpr int lanes = smaller_of(Deep, WARP / Across), warps = Deep / lanes;

    template <int Count, class R, int N, class Join>
    BOTH static void butterfly(R (&values)[N], Join join) {
        UNROLLED (int step = Across; step < Across * Count; step *= 2) {
            R others[N];
            UNROLLED (int i = 0; i < N; i++) others[i] = __shfl_xor_sync(~0u, values[i], step);
            join(values, others);
        }
    }

    // Every join is a type of its own, and so has its own shared memory: one barrier is enough.
    template <class R, int N, class Join>
    BOTH static void reduce(int thread, R (&values)[N], Join join) {
        butterfly<lanes>(values, join);
        if constexpr (warps > 1) {
            constexpr int at_once = WARP / Across;
            __shared__ R meeting[block / WARP][N][Across];
            int lane = thread % WARP, warp = thread / WARP;
            if (lane < Across)
                UNROLLED (int i = 0; i < N; i++) meeting[warp][i][lane] = values[i];
            __syncthreads();
            UNROLLED (int start = 0; start < warps; start += at_once) {
                int from = (warp & -warps) + ((lane / Across + start) & (warps - 1));
                R others[N];
                UNROLLED (int i = 0; i < N; i++) others[i] = meeting[from][i][lane % Across];
                if (start)
                    join(values, others);
                else
                    memcpy(values, others, sizeof others);
            }
            butterfly<smaller_of(warps, at_once)>(values, join);
        }
    }

    BOTH static bool anywhere(bool wanted) {
        return warps > 1 ? __syncthreads_or(wanted) : __any_sync(~0u, wanted);
    }
};

// -- tiles: what a group holds of a row, or of neighbouring columns ------------------------------

template <class E, bool Along, int Across, int Deep, int Together, int Vectors> struct Tile {
    using R = typename Computed<E>::Type;
    using G = Group<Across, Deep, Together>;
    static constexpr int width = 16 / sizeof(E), lanes = Along ? 1 : width;
    static constexpr int each = Along ? Vectors * width : Vectors;  // numbers of each lane
    static constexpr int deep = Deep, advance = Along ? Deep * width : Deep;
    static constexpr int tile = advance * Vectors;

    int64_t index, column;
    int behind;  // threads before this one, along the lane
    bool live;
    R values[lanes][each];

    BOTH Tile(int thread, unsigned unit, int64_t outer, int64_t inner) {
        int64_t item = (int64_t)unit * Together + thread / G::threads;
        behind = thread % G::threads / Across;
        int64_t panels = Along ? 1 : (inner + Across * width - 1) / (Across * width);
        index = Along ? item : item / panels;
        column = Along ? 0 : (item % panels * Across + thread % Across) * width;
        live = index < outer && column < inner;
    }

    BOTH int first() const { return Along ? behind * width : behind; }

    // Calls back with each vector of the thread that begins before the end of its lane.
    template <class Do> BOTH void each_vector(int left, Do act) {
        left = live ? left - first() : 0;
        UNROLLED (int j = 0; j < Vectors; j++) act(j, j * advance < left);
    }

    // Of a vector, where there are lanes of their own in it, one number belongs to each.
    BOTH R& at(int j, int i) { return Along ? values[0][j * width + i] : values[i][j]; }

    // -inf as often as it fits.
    BOTH static uint4 filled() {
        if (sizeof(E) == 2) return {0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u};
        if (sizeof(E) == 4) return {0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u};
        return {0, 0xfff00000u, 0, 0xfff00000u};
    }

    // From the address of the thread's first number; step: bytes from one lane element to the next.
    BOTH void load(const char* x, int64_t step, int left) {
        each_vector(left, [&](int j, bool inside) {
            uint4 read = filled();
            if (inside) read = *(const uint4*)(x + j * advance * (Along ? sizeof(E) : step));
            R held[width];
            unpack<E>(read, held);
            UNROLLED (int i = 0; i < width; i++) at(j, i) = held[i];
        });
    }

    BOTH static void store_one(char* place, R value) {
        if constexpr (sizeof(E) == sizeof(R))
            *(R*)place = value;
        else
            *(uint16_t*)place = rounded_pair(value, 0);
    }

    BOTH void store(char* out, int64_t step, int left) {
        each_vector(left, [&](int j, bool inside) {
            R held[width];
            UNROLLED (int i = 0; i < width; i++) held[i] = at(j, i);
            uint4* place = (uint4*)(out + j * advance * (Along ? sizeof(E) : step));
            uint4 written = pack<E>(held);
            if (inside) *place = written;
        });
    }
};

template <class R, int N> BOTH R maximum(const R (&values)[N]) {
    R m = -(R)INFINITY;
    UNROLLED (R x : values) m = larger(x, m);
    return m;
}

// -- how groups join what they know --------------------------------------------------------------

struct Larger {
    template <class R, int N> BOTH void operator()(R (&a)[N], const R (&b)[N]) const {
        UNROLLED (int i = 0; i < N; i++) a[i] = larger(a[i], b[i]);
    }
};

struct Sum {
    template <class R, int N> BOTH void operator()(R (&a)[N], const R (&b)[N]) const {
        UNROLLED (int i = 0; i < N; i++) a[i] += b[i];
    }
};

// For each lane: so many counts, then a sum in two parts.
template <int Counts> struct Add {
    template <class R, int N> BOTH void operator()(R (&a)[N], const R (&b)[N]) const {
        UNROLLED (int i = 0; i < N; i += Counts + 2) {
            if (Counts) a[i] += b[i];
            R *s = a + i + Counts, *c = s + 1;
            Two<R> sum = merge<R>({*s, *c}, {b[i + Counts], b[i + Counts + 1]});
            *s = sum.high, *c = sum.low;
        }
    }
};

// -- lanes that fit their group: `whole` ---------------------------------------------------------

// The sum of a thread's terms; they take the place of the values if they are kept.
template <bool shifts, bool keep, class R, int N>
BOTH Two<R> sum_terms(R (&values)[N], R m, const Scale<R>& by) {
    const R start = Constants<R>::start;
    Two<R> sum = {start, 0};
    UNROLLED (R& x : values) {
        R near = shifts ? by.shifted(x, m) : x;
        if constexpr (keep)
            add_one<true>(sum, x = by.exp(near));
        else
            add_exp(sum, near, by);
    }
    return {sum.high - start, sum.low};
}

// The pair of maximum m: its count, and the sum of the other terms.
template <bool shifts, class R, int N>
BOTH void push_terms(const R (&values)[N], R m, R& count, Two<R>& sum) {
    Scale<R> by(m);
    Two<R> before = sum;
    if (!Constants<R>::precise) sum = {0, 0};  // plain sums are of these numbers alone
    UNROLLED (R x : values) {
        bool equal = x == m;
        Two<R> term = by.exp_two_parts(shifts ? by.shifted(x, m) : x, sum.low);
        if (!equal) sum.low = term.low;
        add_one<false>(sum, equal ? (R)0 : term.high);
        count += equal ? 1 : 0;
    }
    if (!Constants<R>::precise) sum = merge(before, sum);
}

template <class R, int N>
BOTH void push(const R (&values)[N], R m, R& count, Two<R>& sum) {
    if (Scale<R>::shifts(m))
        push_terms<true>(values, m, count, sum);
    else
        push_terms<false>(values, m, count, sum);
}

template <Op op, class T, class R = typename T::R>
BOTH void whole(int thread, unsigned block, const char* x, char* out, int64_t outer, int n,
                int64_t inner, int64_t x_outer, int64_t x_n, int64_t out_outer, int64_t out_n) {
    using G = typename T::G;
    constexpr bool along = T::lanes == 1;
    constexpr int size = 16 / T::width, lanes = T::lanes;
    T t(thread, block, outer, inner);
    t.load(x + t.index * x_outer + t.column * size + t.first() * (along ? size : x_n), x_n, n);

    R m[lanes], sums[2 * lanes];
    Two<R> total[lanes];
    UNROLLED (int i = 0; i < lanes; i++) m[i] = maximum(t.values[i]);
    G::reduce(thread, m, Larger());
    UNROLLED (int i = 0; i < lanes; i++) {
        Scale<R> by(m[i]);
        constexpr bool keep = op == SOFTMAX;
        total[i] = by.shifts(m[i]) ? sum_terms<true, keep>(t.values[i], m[i], by)
                                   : sum_terms<false, keep>(t.values[i], m[i], by);
        sums[2 * i] = total[i].high, sums[2 * i + 1] = total[i].low;
    }
    if constexpr (Constants<R>::precise) {
        G::reduce(thread, sums, Add<0>());
        UNROLLED (int i = 0; i < lanes; i++) total[i] = {sums[2 * i], sums[2 * i + 1]};
    } else {  // there is no second part
        R high[lanes];
        UNROLLED (int i = 0; i < lanes; i++) high[i] = total[i].high;
        G::reduce(thread, high, Sum());
        UNROLLED (int i = 0; i < lanes; i++) total[i] = {high[i], 0};
    }

    char* place = out + t.index * out_outer + t.column * size;
    if constexpr (op == SOFTMAX) {
        UNROLLED (int i = 0; i < lanes; i++) {
            Two<R> inverse = reciprocal(m[i], total[i]);
            UNROLLED (R& term : t.values[i]) term = softmax(term, inverse);
        }
    } else {
        // log_softmax wants the sum of all terms but one largest, to its last bit; logsumexp does
        // where it is near 0.
        constexpr int additions = T::each + bit_length(T::deep);
        // Logsumexp of neighbouring lanes: each of the threads behind each other finishes one.
        constexpr bool one_each = op == LOGSUMEXP && lanes > 1 && T::deep >= lanes;
        constexpr int finished = one_each ? 1 : lanes;
        int own = t.behind % lanes;
        R maxima[finished];
        bool small[finished], any = false;
        R result[finished];
        UNROLLED (int i = 0; i < lanes; i++)
            if (!one_each || i == 0 || own == i) {
                maxima[i % finished] = m[i];
                total[i % finished] = total[i];
            }
        UNROLLED (int i = 0; i < finished; i++) {
            if constexpr (op == LOGSUMEXP) {
                result[i] = logsumexp_of_all(maxima[i], total[i]);
                small[i] = !(larger(magnitude(maxima[i]), magnitude(result[i])) > 1);
            } else {
                total[i] = without_one(m[i], total[i]);
                small[i] = is_small(m[i], total[i].high, additions);
            }
            any |= small[i];
        }
        if (G::anywhere(any)) {
            R pairs[3 * lanes];
            UNROLLED (int i = 0; i < lanes; i++) {
                R count = 0;
                Two<R> sum = {0, 0};
                push(t.values[i], m[i], count, sum);
                pairs[3 * i] = count, pairs[3 * i + 1] = sum.high, pairs[3 * i + 2] = sum.low;
            }
            G::reduce(thread, pairs, Add<1>());
            UNROLLED (int i = 0; i < lanes; i++) {
                int k = i % finished;
                if (small[k] && (!one_each || own == i)) {
                    total[k] = with_equals<R>(m[i], pairs[3 * i],
                                              {pairs[3 * i + 1], pairs[3 * i + 2]});
                    if constexpr (op == LOGSUMEXP) result[k] = logsumexp(m[i], total[k]);
                }
            }
        }
        if constexpr (one_each)
            if (t.live && t.behind < lanes) T::store_one(place + t.behind * size, result[0]);
        UNROLLED (int i = 0; i < lanes; i++) {
            if constexpr (op == LOGSUMEXP) {
                if (!one_each && t.live && t.behind == 0)
                    T::store_one(place + i * size, result[i % finished]);
            } else {
                R log = log_sum(m[i], total[i]).high;
                UNROLLED (R& value : t.values[i]) value = (value - m[i]) - log;
            }
        }
    }
    if constexpr (op != LOGSUMEXP) t.store(place + t.first() * (along ? size : out_n), out_n, n);
}

// -- longer rows, in chunks: `pairs`, `apply` ----------------------------------------------------

template <class R> struct Pair {
    R m = -(R)INFINITY, count = 0;
    Two<R> sum = {0, 0};

    // As part of a lane of that maximum.
    BOTH void raise(R whole) {
        Scale<R> by(whole);
        R term = by.exp(m - by.shift), product = count * term;
        R rest = fused(count, term, -product);
        Two<R> scaled = rescaled(m, whole, sum), raised = {product, rest + scaled.low};
        add(raised, scaled.high);
        // No branch: some thread of a warp sees a new maximum in nearly every tile.
        bool same = m == whole;
        *this = {whole, same ? count : 0, same ? sum : raised};
    }

    BOTH void join(Pair other) {
        R whole = larger(m, other.m);
        raise(whole);
        other.raise(whole);
        count += other.count;
        sum = merge(sum, other.sum);
    }

    // Of all threads of a group.
    template <class G> BOTH void share(int thread) {
        R whole[1] = {m};
        G::reduce(thread, whole, Larger());
        raise(whole[0]);
        R parts[3] = {count, sum.high, sum.low};
        G::reduce(thread, parts, Add<1>());
        count = parts[0], sum = {parts[1], parts[2]};
    }
};

template <class T, class R = typename T::R>
BOTH void pairs(int thread, unsigned block, const char* x, R* out, int64_t outer, int64_t n,
                int64_t x_outer, unsigned chunks, int64_t length) {
    constexpr int size = 16 / T::width;
    unsigned chunk = block % chunks;
    T t(thread, block / chunks, outer, 1);
    int64_t start = chunk * length, end = start + length < n ? start + length : n;
    const char* place = x + t.index * x_outer + (start + t.first()) * size;
    Pair<R> pair;
    for (int left = end - start; left > 0; left -= T::tile, place += T::tile * size) {
        t.load(place, 0, left);
        pair.raise(larger(maximum(t.values[0]), pair.m));
        push(t.values[0], pair.m, pair.count, pair.sum);
    }
    pair.template share<typename T::G>(thread);
    if (t.live && t.behind == 0) {
        out += chunk * outer + t.index;
        const R parts[4] = {pair.m, pair.count, pair.sum.high, pair.sum.low};
        UNROLLED (int i = 0; i < 4; i++) out[i * chunks * outer] = parts[i];
    }
}

template <bool shifts, class R, int N>
BOTH void softmax(R (&values)[N], R m, const Scale<R>& by, Two<R> inverse) {
    UNROLLED (R& value : values) {
        value = softmax(by.exp(shifts ? by.shifted(value, m) : value), inverse);
    }
}

template <Op op, class T, class R = typename T::R>
BOTH void apply(int thread, unsigned block, const char* x, const R* pairs, char* out,
                int64_t outer, int64_t n, int64_t x_outer, int64_t out_outer, unsigned chunks,
                int64_t length) {
    constexpr int size = 16 / T::width;
    unsigned chunk = block % chunks;
    T t(thread, block / chunks, outer, 1);
    Pair<R> pair;
    for (unsigned i = t.behind; t.live && i < chunks; i += T::G::threads) {
        const R* at = pairs + i * outer + t.index;
        int64_t plane = chunks * outer;
        Pair<R> other;
        other.m = at[0], other.count = at[plane], other.sum = {at[2 * plane], at[3 * plane]};
        pair.join(other);
    }
    pair.template share<typename T::G>(thread);
    Two<R> sum = with_equals(pair.m, pair.count, pair.sum), needs;
    R m = pair.m;
    if constexpr (op == SOFTMAX) {
        Two<R> all = {largest(m).high, sum.low};
        add(all, sum.high);
        needs = reciprocal(m, all);
    } else {
        needs = log_sum(m, sum);
    }
    Scale<R> by(m);
    int64_t low = chunk * length, end = low + length < n ? low + length : n;
    // Backwards: what was read last lies in the cache.
    int64_t start = low + (end - 1 - low) / T::tile * T::tile;
    const char* from = x + t.index * x_outer + (start + t.first()) * size;
    char* to = out + t.index * out_outer + (start + t.first()) * size;
    for (; start >= low; start -= T::tile, from -= T::tile * size, to -= T::tile * size) {
        int left = end - start;
        t.load(from, 0, left);
        if constexpr (op == SOFTMAX) {
            if (by.shifts(m))
                softmax<true>(t.values[0], m, by, needs);
            else
                softmax<false>(t.values[0], m, by, needs);
        } else {
            UNROLLED (R& value : t.values[0]) value = (value - m) - needs.high;
        }
        t.store(to, 0, left);
    }
}
