// Convolution and matrix product with a shuffled-block weight, channels last.
//
//   y[pixel, rows[r]] = act(bias[rows[r]] + residual[pixel, rows[r]] + sum_k values[g][k][r] * x[offset[k] + pixel])
//
// A row group g has R rows and K kept columns; a column is one (ky, kx, channel). Rows lie in vector lanes, some pixels
// are handled at once: for every column one load of R weights, and per pixel one broadcast and R / LANES multiply-adds.
// Where a column is read is data (one int per column), not code, so free columns cost nothing. Groups of few rows would
// leave most lanes empty: with `lanes` PIXELS_IN_LANES it is shuffled_block_pixels.h that does the work.
//
// Compiled once for the machine's widest vectors (16, 8 or 4 floats) by fxsparse/kernels/build.py.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "bfloat16.h"
#include "shuffled_block.h"
#include "shuffled_block_field.h"
#include "shuffled_block_pixels.h"
#include "shuffled_block_plan.h"
#include "shuffled_block_tile.h"

namespace {

template <typename T>
struct Convolution : Plan<T> {
    using Base = Plan<T>;
    using Base::SIZE, Base::BESIDE, Base::FETCHED, Base::q, Base::x, Base::y, Base::residual, Base::given;
    using Base::values, Base::value_ptr, Base::columns, Base::column_ptr, Base::rows, Base::row_ptr, Base::in_order;
    using Base::pixels_in, Base::pixels_out, Base::left, Base::right, Base::copies, Base::picks, Base::together, Base::far_out;
    using Base::band, Base::bands, Base::parts, Base::part_ptr, Base::lane_bias, Base::lane_ptr, Base::lane_of, Base::scatters;
    using Base::beside, Base::taps_wide, Base::copy_width, Base::input_rows;
    static constexpr int32_t FIRST = 0;  // the rows of a sink that begins with row 0

    // All of an image with its padding, `step` elements from one pixel to the next.
    void scatter_image(int64_t image, int64_t step, Read<T>* to) const {
        for (int64_t i = 0; i < input_rows(q.out_height); i++)
            for (int64_t j = 0; j < copy_width(); j++, to += step) {
                const int64_t row = i - q.padding_y, column = j - q.padding_x;
                if (row < 0 || row >= q.height || column < 0 || column >= q.width)
                    std::memset(to, 0, q.channels * SIZE);
                else
                    copy(x + ((image * q.height + row) * q.width + column) * q.channels, q.channels, to);
            }
    }

    // Input rows of a band, `wide` pixels of each from column `from_x` on, zeros outside of the image.
    void copy_band(int64_t image, int64_t first, int64_t rows_out, int64_t from_x, int64_t wide, Read<T>* to) const {
        const int64_t before = std::clamp<int64_t>(-from_x, 0, wide);
        const int64_t end = std::clamp<int64_t>(q.width - from_x, before, wide);
        for (int64_t i = 0; i < input_rows(rows_out); i++, to += wide * q.channels) {
            const int64_t row = first * q.stride_y - q.padding_y + i;
            if (row < 0 || row >= q.height) {
                std::memset(to, 0, wide * q.channels * SIZE);
                continue;
            }
            const int64_t at = (image * q.height + row) * q.width + from_x + before;
            const int64_t kept = std::clamp<int64_t>(pixels_in - at, 0, end - before);  // the last line may be short
            std::memset(to, 0, before * q.channels * SIZE);
            if (picks) copy_picked(at, kept, to);
            else copy(x + at * q.channels, kept * q.channels, to + before * q.channels);
            std::memset(to + (before + kept) * q.channels, 0, (wide - before - kept) * q.channels * SIZE);
        }
    }
    // The same rows, all of their columns, channel by channel.
    void copy_planes(int64_t image, int64_t first, int64_t rows_out, Read<T>* to) const {
        const int64_t wide = copy_width(), before = std::min(q.padding_x, wide), kept = std::min(q.width, wide - before);
        for (int64_t channel = image * q.channels; channel < (image + 1) * q.channels; channel++)
            for (int64_t i = 0; i < input_rows(rows_out); i++, to += wide) {
                const int64_t row = first * q.stride_y - q.padding_y + i;
                std::memset(to, 0, wide * SIZE);
                if (row >= 0 && row < q.height) copy(x + (channel * q.height + row) * q.width, kept, to + before);
            }
    }
    // Of `n` output pixels from `first` on the input pixels.
    void copy_picked(int64_t first, int64_t n, Read<T>* to) const {
        for (int64_t pixel = first; pixel < first + n; pixel++, to += q.channels) {
            const int64_t row = pixel / given.out_width, image = row / given.out_height;
            const int64_t y_in = row % given.out_height * given.stride_y, x_in = pixel % given.out_width * given.stride_x;
            copy(x + ((image * given.height + y_in) * given.width + x_in) * q.channels, q.channels, to);
        }
    }
    static void copy(const Read<T>* from, int64_t n, Read<T>* to) { std::memcpy(to, from, n * SIZE); }
    template <typename From>
    static void copy(const From* from, int64_t n, float* to) {
        for (int64_t i = 0; i < n; i++) to[i] = widen(from[i]);
    }

    // `count` images from `image` on, or a band of one, as fields.
    void lay_out(int64_t image, int64_t count, int64_t first, int64_t rows_out, Scratch<T>& scratch) const {
        const int64_t strips = copies ? copy_width() : (left + q.out_width - right) * taps_wide();
        Read<T>* copied = scratch.copied.of(count * input_rows(rows_out) * strips * q.channels);
        scratch.fields.clear();
        if (together > 1) lay_across(image, count, copied, scratch.fields);
        else lay_image(image, first, rows_out, copied, scratch.fields);
        for (const Field<T>& f : scratch.fields) {
            std::vector<int64_t>& place = scratch.place[f.is_border];
            place.resize(f.pixels);
            for (int64_t i = 0; i < f.pixels; i++) place[i] = i / f.per_row * f.x_line + i % f.per_row * f.x_pixel;
        }
    }

    // A line for every output pixel: of each image the one there.
    void lay_across(int64_t image, int64_t count, Read<T>* copied, std::vector<Field<T>>& fields) const {
        const int64_t step = count * q.channels, row_step = copy_width() * step;
        for (int64_t i = 0; i < count; i++) scatter_image(image + i, step, copied + i * q.channels);
        for (int64_t ox = 0; ox < q.out_width; ox++) {
            const int64_t to = (image * q.out_height * q.out_width + ox) * q.out_channels;
            fields.push_back({copied + ox * q.stride_x * step, row_step * q.stride_y, q.channels, y + to,
                              residual ? residual + to : nullptr, q.out_width * q.out_channels,
                              q.out_height * q.out_width * q.out_channels, q.out_height, count, row_step, step, 0, false,
                              count});
        }
    }

    // One field where the input is copied or not padded; else what lies inside, read in place, and one for the border
    // columns on either side, whose pixels are taken downwards.
    void lay_image(int64_t image, int64_t first, int64_t rows_out, Read<T>* copied, std::vector<Field<T>>& fields) const {
        const int64_t at = (image * q.out_height + first) * q.out_width;
        if (copies) {
            if (q.planes) copy_planes(image, first, rows_out, copied);
            else copy_band(image, first, rows_out, -q.padding_x, copy_width(), copied);
            const int64_t row_step = copy_width() * beside();
            fields.push_back(field(copied, row_step, at, rows_out, 0, q.out_width, first));
            if (q.planes) fields.back().plane = input_rows(rows_out) * row_step;
            if (NARROW) fields.back().pixels *= std::exchange(fields.back().lines, 1);  // one line: its tiles are full
            return;
        }
        const int64_t row_step = q.width * q.channels, top = first * q.stride_y - q.padding_y;
        if constexpr (std::is_same_v<T, Read<T>>) {
            const T* from = x + (image * q.height + top) * row_step + (left * q.stride_x - q.padding_x) * q.channels;
            fields.push_back(field(from, row_step, at, rows_out, left, right, first));
        }
        const int64_t strip = input_rows(rows_out) * taps_wide() * q.channels;
        for (int64_t ox = 0; ox < left; ox++, copied += strip)
            fields.push_back(border(image, first, rows_out, ox, copied));
        for (int64_t ox = right; ox < q.out_width; ox++, copied += strip)
            fields.push_back(border(image, first, rows_out, ox, copied));
    }

    // Output column `ox` of a band, read from a padded copy of the pixels under its taps.
    Field<T> border(int64_t image, int64_t first, int64_t rows_out, int64_t ox, Read<T>* to) const {
        copy_band(image, first, rows_out, ox * q.stride_x - q.padding_x, taps_wide(), to);
        const int64_t at = (image * q.out_height + first) * q.out_width;
        Field<T> f = field(to, taps_wide() * q.channels, at, 1, ox, ox + 1, -1);
        f.pixels = f.per_row = rows_out;
        f.x_pixel = f.x_line;
        f.y_pixel = f.y_line;
        f.is_border = true;
        return f;
    }

    Field<T> field(const Read<T>* from, int64_t row_step, int64_t at, int64_t lines, int64_t x0, int64_t x1,
                   int64_t first_row) const {
        const int64_t to = (at + x0) * q.out_channels;
        return {from, row_step * q.stride_y, beside() * q.stride_x, y + to, residual ? residual + to : nullptr,
                q.out_width * q.out_channels, q.out_channels, lines, x1 - x0, row_step, beside(), first_row, false,
                x1 - x0};
    }

    // Position of every column of the groups relative to a pixel: all of a tap are shifted alike, and columns ascend.
    void locate(int64_t part, const Field<T>& f, std::vector<int32_t>& offset) const {
        const int32_t* const first = columns + column_ptr[part_ptr[part]];
        offset.resize(columns + column_ptr[part_ptr[part + 1]] - first);
        for (int64_t g = part_ptr[part]; g < part_ptr[part + 1]; g++) {
            const int32_t *column = columns + column_ptr[g], *const end = columns + column_ptr[g + 1];
            while (column < end) {
                const int64_t tap = *column / q.channels, ky = tap / q.kernel_width, kx = tap % q.kernel_width;
                const int32_t* const next = std::lower_bound(column, end, (tap + 1) * q.channels);
                const auto shift = static_cast<int32_t>(ky * q.dilation_y * f.row_step + kx * q.dilation_x * f.tap_step);
                const auto plane = static_cast<int32_t>(f.plane), none = static_cast<int32_t>(tap * q.channels);
                int32_t* to = offset.data() + (column - first);
                for (; column < next; column++) *to++ = (*column - none) * plane + shift;
            }
        }
    }

    // The columns of group g whose taps lie inside the image for an output row: [from, to).
    std::pair<int64_t, int64_t> inside(int64_t g, int64_t out_row) const {
        const int64_t top = out_row * q.stride_y - q.padding_y, tap_row = q.kernel_width * q.channels;
        const int32_t *begin = columns + column_ptr[g], *end = columns + column_ptr[g + 1];
        const int64_t low = top < 0 ? (-top + q.dilation_y - 1) / q.dilation_y : 0;
        const int64_t high = top >= q.height ? 0 : std::min(q.kernel_height, (q.height - top - 1) / q.dilation_y + 1);
        const int64_t from = low ? std::lower_bound(begin, end, low * tap_row) - begin : 0;
        const int64_t to = high < q.kernel_height ? std::lower_bound(begin, end, high * tap_row) - begin : end - begin;
        return {from, std::max(from, to)};
    }

    // Some vectors of rows of a group, over the lines of a field.
    struct Strip {
        int64_t g, vectors, most;  // most: pixels of a tile
        const Read<T>* w;
        int64_t lanes;  // from one column's weights to the next
        const int32_t* offset;
        const int64_t* place;
        Next next;
    };

    // Either every group goes over all lines of all fields, and its weights stay in the caches; or all groups over every
    // line, and what they read and write stays there: better while the weights are few, or used for many pixels each time.
    void run_part(int64_t part, Scratch<T>& scratch) const {
        const int64_t from = part_ptr[part], to = part_ptr[part + 1];
        const bool few = (value_ptr[to] - value_ptr[from]) * SIZE <= WEIGHT_BYTES;
        const auto by_line = [=](const Field<T>& f) { return few || f.pixels >= LONG_LINE; };
        const Field<T>* last = nullptr;
        bool located[2] = {false, false};
        for (const Field<T>& f : scratch.fields) {
            if (!std::exchange(located[f.is_border], true)) locate(part, f, scratch.offset[f.is_border]);
            if (!by_line(f)) last = &f;
        }
        if (scatters) make_room(scratch, by_line);
        for (const Field<T>& f : scratch.fields)
            for (int64_t line = 0; line < f.lines && by_line(f); line++) {
                for (int64_t g = from; g < to; g++) run_group(g, f, line, line + 1, scratch, part, true);
                if (scatters) hand_out(f, line, line + 1);
            }
        for (int64_t g = from; g < to && last; g++)
            for (const Field<T>& f : scratch.fields)
                if (!by_line(f)) run_group(g, f, 0, f.lines, scratch, part, &f == last);
        for (const Field<T>& f : scratch.fields)
            if (!by_line(f) && scatters) hand_out(f, 0, f.lines);
    }

    // For the sums of all lines that the groups pass at once.
    template <typename BY_LINE>
    void make_room(Scratch<T>& scratch, const BY_LINE& by_line) const {
        const auto at_once = [&](const Field<T>& f) { return (by_line(f) ? 1 : f.lines) * f.pixels * lane_ptr[q.groups]; };
        int64_t all = 0;
        for (const Field<T>& f : scratch.fields) all += at_once(f);
        float* sums = scratch.sums.of(all);
        for (Field<T>& f : scratch.fields) f.sums = std::exchange(sums, sums + at_once(f));
    }

    // Rows of a group that lie scattered would each be written to another line of the cache, and by the next group that
    // line is gone. So sums lie beside each other, [pixel, lane], until all groups are there; then y is written in order.
    void hand_out(const Field<T>& f, int64_t first_line, int64_t last_line) const {
        for (int64_t line = first_line; line < last_line; line++) {
            const int64_t at = line * f.y_line;
            const Sink<T> sink{f.y + at, f.residual ? f.residual + at : nullptr, nullptr, &FIRST, q.out_channels, true,
                               f.y_pixel, static_cast<int>(q.activation), false};
            const float* from = f.sums + (line - first_line) * f.pixels * lane_ptr[q.groups];
            put_gathered(from, lane_of.data(), pixels_of(f, line), lane_ptr[q.groups], sink);
        }
    }

    int64_t pixels_of(const Field<T>& f, int64_t line) const {  // of the last line there may be fewer
        return std::min(f.pixels, pixels_out - (f.y + line * f.y_line - y) / q.out_channels);
    }

    void run_group(int64_t g, const Field<T>& f, int64_t first_line, int64_t last_line, Scratch<T>& scratch, int64_t part,
                   bool fetches) const {
        const int64_t count = row_ptr[g + 1] - row_ptr[g], lanes = lane_ptr[g + 1] - lane_ptr[g];
        const int64_t vectors = (count + LANES - 1) / LANES, tiles = (vectors + WIDEST - 1) / WIDEST;
        const int64_t lines = last_line - first_line;
        // Pixels that lie multiples of 4096 bytes apart share their lines of the first-level cache: not more than fit.
        const int64_t fit = (CACHE_WAYS - 1) * (CACHE_BYTES / std::gcd(CACHE_BYTES, f.x_pixel * SIZE));
        Strip strip{g, 0, 0, nullptr, lanes, nullptr, scratch.place[f.is_border].data(), {}};
        strip.offset = scratch.offset[f.is_border].data() + column_ptr[g] - column_ptr[part_ptr[part]];
        for (int64_t t = 0, v = 0; t < tiles; t++, v += strip.vectors) {
            const int64_t lane = v * LANES;
            strip.vectors = (vectors - v + tiles - t - 1) / (tiles - t);
            strip.most = std::min<int64_t>(ACCUMULATORS / strip.vectors, fit);
            strip.w = values + value_ptr[g] + lane * BESIDE;
            const int64_t cuts = (f.pixels + strip.most - 1) / strip.most;
            strip.next = after(g, fetches ? tiles * lines * cuts : 0);
            for (int64_t i = 0; i < lines; i++) {
                const int64_t line = first_line + i, nth = (t * lines + i) * cuts;
                if (scatters) run_line(strip, f, line, nth, among_sums(g, lane, f, i));
                else run_line(strip, f, line, nth, in_place(g, lane, f, line));
            }
        }
    }

    // Where lanes of a group go, from `lane` on: to a line of y, or to the sums of the i-th of the lines passed at once.
    Sink<T> in_place(int64_t g, int64_t lane, const Field<T>& f, int64_t line) const {
        const int64_t at = line * f.y_line;
        return {f.y + at, f.residual ? f.residual + at : nullptr, lane_bias.data() + lane_ptr[g] + lane,
                rows + row_ptr[g] + lane, row_ptr[g + 1] - row_ptr[g] - lane, in_order[g] != 0, f.y_pixel,
                static_cast<int>(q.activation), far_out};
    }
    Sink<float> among_sums(int64_t g, int64_t lane, const Field<T>& f, int64_t i) const {
        const int64_t at = lane_ptr[g] + lane, wide = lane_ptr[q.groups];
        return {f.sums + i * f.pixels * wide + at, nullptr, lane_bias.data() + at, &FIRST, lane_ptr[g + 1] - at, true, wide,
                NONE, true};
    }

    // The pixels that the next line is the first to read: scattered reads are no pattern for the hardware's prefetcher.
    static void prefetch(const Read<T>* from, int64_t n) {
        for (int64_t i = 0; i < n; i += CACHE_LINE / SIZE) __builtin_prefetch(from + i, 0, 2);
    }

    Next after(int64_t g, int64_t all) const {
        const char* from = reinterpret_cast<const char*>(values + value_ptr[g + 1]);
        if (g + 1 == q.groups || all == 0) return {reinterpret_cast<const char*>(values), 0, 0, 0};
        const int64_t columns_here = std::max<int64_t>(1, column_ptr[g + 1] - column_ptr[g]);
        const int64_t bytes = (value_ptr[g + 2] - value_ptr[g + 1]) * SIZE, of_a_tile = columns_here * FETCHED;
        const int64_t tiles = std::min(all, (bytes + of_a_tile - 1) / of_a_tile + 1);
        return {from, all - tiles, bytes / tiles, bytes / tiles / columns_here};
    }

    // All pixels of a line; the group had `nth` tiles before.
    template <typename To>
    void run_line(const Strip& s, const Field<T>& f, int64_t line, int64_t nth, Sink<To> sink) const {
        const int64_t tall = (q.kernel_height - 1) * q.dilation_y * f.row_step;
        const bool far = !copies && f.pixels > 1 && s.g == 0 && q.height * q.width * q.channels * SIZE > 4 * COPIED_BYTES;
        int64_t from = 0, to = column_ptr[s.g + 1] - column_ptr[s.g];
        if (f.first_row >= 0) std::tie(from, to) = inside(s.g, f.first_row + line);
        const Read<T>* x = f.x + line * f.x_line;
        const int64_t pixels = pixels_of(f, line);
        const int64_t cuts = (pixels + s.most - 1) / s.most, longer = pixels % cuts;
        for (int64_t c = 0, i = 0, here; c < cuts; c++, i += here) {
            here = pixels / cuts + (c < longer);
            if (f.per_row < pixels && f.first_row >= 0) {  // what the first of its image rows needs, or the last
                from = inside(s.g, f.first_row + (i + here - 1) / f.per_row).first;
                to = inside(s.g, f.first_row + i / f.per_row).second;
            }
            if (far) prefetch(x + s.place[i] + f.x_line + tall, here * q.channels);
            const auto tile = tile_for<Read<T>, To>(static_cast<int>(s.vectors), static_cast<int>(here));
            tile(x, s.place + i, f.x_pixel, s.offset, from, to, s.w, s.lanes, s.next.of(nth + c), sink);
            sink.y += here * sink.step;
            if (sink.residual) sink.residual += here * sink.step;
        }
    }

    void run() {
        this->plan();
        const int64_t items = (q.images + together - 1) / together * bands * parts;
#pragma omp parallel num_threads(static_cast<int>(q.threads)) if (q.threads > 1 && items > 1)
        {
            static thread_local Scratch<T> scratch;
            int64_t held = -1;
#pragma omp for schedule(dynamic, 1)
            for (int64_t item = 0; item < items; item++) {
                const int64_t unit = item / parts, part = item % parts, first = unit % bands * band;
                const int64_t image = unit / bands * together, count = std::min(together, q.images - image);
                if (held != unit)
                    lay_out(image, count, first, std::min(band, q.out_height - first), scratch);
                held = unit;
                run_part(part, scratch);
            }
        }
    }
};

// KERNEL: Convolution, or pixels::Convolution.
template <template <typename> class KERNEL, typename T, typename VALUE>
void run(const Problem* q, const void* x, void* y, const VALUE* values, const int64_t* value_ptr,
         const int32_t* columns, const int32_t* column_ptr, const int32_t* rows, const int32_t* row_ptr,
         const void* bias, const void* residual) {
    KERNEL<T> convolution{*q,    static_cast<const T*>(x),    static_cast<T*>(y),
                          values, value_ptr,                   columns,
                          column_ptr, rows,                    row_ptr,
                          static_cast<const T*>(bias), static_cast<const T*>(residual)};
    convolution.run();
}

// Pairs [K / 2, L, 2] of every group as [K, L], for processors that do not multiply pairs.
[[maybe_unused]] std::vector<float> apart(const BFloat16* pairs, const int64_t* value_ptr, const int32_t* row_ptr,
                                          int64_t groups) {
    std::vector<float> values(value_ptr[groups]);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t lanes = (row_ptr[g + 1] - row_ptr[g] + PADDED_TO - 1) / PADDED_TO * PADDED_TO;
        for (int64_t at = value_ptr[g]; at < value_ptr[g + 1]; at += 2 * lanes)
            for (int64_t i = 0; i < 2 * lanes; i++) values[at + i % 2 * lanes + i / 2] = widen(pairs[at + i]);
    }
    return values;
}

}  // namespace

extern "C" {

void fxsparse_shuffled_block_f32(const Problem* q, const void* x, void* y, const float* values,
                                 const int64_t* value_ptr, const int32_t* columns, const int32_t* column_ptr,
                                 const int32_t* rows, const int32_t* row_ptr, const void* bias, const void* residual) {
    const auto kernel = q->lanes == shuffled_block::PIXELS_IN_LANES ? run<pixels::Convolution, float, float> : run<Convolution, float, float>;
    kernel(q, x, y, values, value_ptr, columns, column_ptr, rows, row_ptr, bias, residual);
}

void fxsparse_shuffled_block_bf16(const Problem* q, const void* x, void* y, const BFloat16* values,
                                  const int64_t* value_ptr, const int32_t* columns, const int32_t* column_ptr,
                                  const int32_t* rows, const int32_t* row_ptr, const void* bias, const void* residual) {
    if (q->lanes == shuffled_block::PIXELS_IN_LANES) {
        std::vector<float> wide(value_ptr[q->groups]);
        for (size_t i = 0; i < wide.size(); i++) wide[i] = widen(values[i]);
        return run<pixels::Convolution, BFloat16>(q, x, y, wide.data(), value_ptr, columns, column_ptr, rows, row_ptr, bias,
                                                  residual);
    }
#if defined(__AVX512BF16__)
    run<Convolution, BFloat16>(q, x, y, values, value_ptr, columns, column_ptr, rows, row_ptr, bias, residual);
#else
    const std::vector<float> wide = apart(values, value_ptr, row_ptr, q->groups);
    run<Convolution, BFloat16>(q, x, y, wide.data(), value_ptr, columns, column_ptr, rows, row_ptr, bias, residual);
#endif
}
}
