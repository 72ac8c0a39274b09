// How shuffled_block.cpp goes about a layer: what it copies, the bands of pixels and parts of groups that threads take.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "bfloat16.h"
#include "shuffled_block.h"
#include "shuffled_block_field.h"
#include "shuffled_block_tile.h"

namespace {

using shuffled_block::Problem;

template <typename T>
struct Plan {
    static constexpr int64_t SIZE = sizeof(Read<T>);
    static constexpr int64_t FETCHED = NARROW || SIZE < 4 ? CACHE_LINE / 2 : CACHE_LINE;  // bytes with every column
    static constexpr int64_t BESIDE = std::is_same_v<Read<T>, float> ? 1 : 2;  // values of a lane that lie together
    Problem q;
    const T* x;
    T* y;
    const Read<T>* values;  // [K, L] of every group; bfloat16 in pairs, [K / 2, L, 2]
    const int64_t* value_ptr;
    const int32_t *columns, *column_ptr, *rows, *row_ptr;
    const T* bias;
    const T* residual;
    int64_t pixels_in = 0, pixels_out = 0;  // of all images; what is read of the input
    bool copies = false;                    // the input is read from a padded, widened or picked copy of a band
    bool picks = false;                     // pixels between which others are not read are copied together
    const Problem given = q;                // before `flatten`
    int64_t left = 0, right = 0;            // output columns between which no tap leaves the image sideways
    int64_t band = 0, bands = 0, parts = 0; // output rows of a band; bands of an image; parts of the groups
    int64_t together = 1;                   // images handled at once: a line of pixels is one of each
    std::vector<int64_t> part_ptr{};        // groups of every part
    std::vector<float> lane_bias{};         // of every lane of every group, one after the other
    std::vector<int64_t> lane_ptr{};
    bool far_out = false;                   // the output does not fit into the second-level cache
    std::vector<char> in_order{};           // whether a group's rows follow each other
    bool scatters = false;                  // sums lie group by group until all rows are there
    std::vector<int32_t> lane_of{};         // of every row, if so

    int64_t beside() const { return q.planes ? 1 : q.channels; }  // elements from one pixel read to the next
    int64_t taps_wide() const { return (q.kernel_width - 1) * q.dilation_x + 1; }
    int64_t copy_width() const { return (q.out_width - 1) * q.stride_x + taps_wide(); }
    int64_t input_rows(int64_t out_rows) const {
        return (out_rows - 1) * q.stride_y + (q.kernel_height - 1) * q.dilation_y + 1;
    }

    // Output pixels that read one input pixel each: images and rows do not matter, so cut all pixels into lines of one length.
    // With a stride they have to be copied for that, which pays where it saves reading many weights for every few rows.
    void flatten() {
        pixels_out = q.images * q.out_height * q.out_width;
        pixels_in = q.images * q.height * q.width;
        if (q.planes) return;
        const bool some = q.stride_y * q.stride_x > 1, few_weights = value_ptr[q.groups] * SIZE <= WEIGHT_BYTES;
        if (q.kernel_height * q.kernel_width > 1 || q.padding_y || q.padding_x || (some && few_weights)) return;
        picks = some;
        if (picks) pixels_in = pixels_out;
        q.images = q.stride_y = q.stride_x = 1;
        q.width = q.out_width = scatters ? even_line() : std::min(LINE, pixels_out);
        q.height = q.out_height = (pixels_out + q.width - 1) / q.width;
    }

    // The same number of lines for every thread; of few pixels one line, whose weights all threads share.
    int64_t even_line() const {
        if (pixels_out < LEAST_LINE * q.threads) return pixels_out;
        const int64_t each = (pixels_out + SCATTERED_LINE * q.threads - 1) / (SCATTERED_LINE * q.threads);
        return (pixels_out + each * q.threads - 1) / (each * q.threads);
    }

    void plan() {
        prepare_lanes();
        flatten();
        left = (q.padding_x + q.stride_x - 1) / q.stride_x;
        right = std::min(q.out_width, (q.width + q.padding_x - taps_wide()) / q.stride_x + 1);
        const bool padded = q.padding_y || q.padding_x;
        const bool small = q.height * q.width * q.channels * SIZE <= COPIED_BYTES;
        copies = picks || q.planes || !std::is_same_v<T, Read<T>> || (padded && (small || right - left < SHORT_LINE));
        const int64_t band_bytes = value_ptr[q.groups] * SIZE > MANY_WEIGHTS ? 2 * BAND_BYTES : BAND_BYTES;
        const int64_t in_row = (copies ? copy_width() : q.width) * q.channels * q.stride_y;
        band = std::max<int64_t>(1, band_bytes / SIZE / (in_row + q.out_width * q.out_channels));
        if (copies) band = std::max(band, std::min<int64_t>(q.out_height, q.kernel_height * q.dilation_y));
        if (scatters && q.kernel_height * q.kernel_width == 1) band = std::min(band, (q.out_height + q.threads - 1) / q.threads);
        cut((q.out_height + band - 1) / band);
        if (q.threads > 1 && (bands > 1 || q.images == 1)) cut_evenly();
        far_out = pixels_out * q.out_channels * SIZE > 4 * COPIED_BYTES;
        if (bands == 1 && q.images > 1 && !q.planes && value_ptr[q.groups] * SIZE > WEIGHT_BYTES) take_together();
        const int64_t units = (q.images + together - 1) / together * bands;
        parts = parts_of(units);
        split_groups();
        scatters = scatters && parts == 1;
        if (scatters) find_lanes();
    }

    void cut(int64_t into) {
        band = (q.out_height + into - 1) / into;
        bands = (q.out_height + band - 1) / band;
    }

    // Some bands more, if the threads wait less for each other then: by more than the hundredth that a band costs.
    void cut_evenly() {
        const int64_t least = bands;
        std::pair<double, int64_t> best{rows_of_a_thread(), least};
        for (int64_t n = least + 1; n < least + 2 * q.threads && n <= q.out_height; n++) {
            cut(n);
            best = std::min(best, {rows_of_a_thread() * (1 + 0.01 * static_cast<double>(n - least)), n});
        }
        cut(best.second);
    }

    // Output rows that the busiest thread computes: whole bands are taken one after the other, then the last, shorter ones.
    double rows_of_a_thread() const {
        const int64_t n = parts_of(q.images * bands), last = q.out_height - (bands - 1) * band;
        const int64_t rounds = q.images * (bands - 1) * n / q.threads, left = q.images * (bands - 1) * n % q.threads;
        const int64_t lasts = (q.images * n + q.threads - left - 1) / (q.threads - left);
        return static_cast<double>(rounds * band + std::max(left ? band : 0, lasts * last)) / static_cast<double>(n);
    }

    // Parts that the groups are divided into, if there are so many units of pixels already.
    int64_t parts_of(int64_t units) const {
        const bool even = (units + q.threads - 1) / q.threads * q.threads * 4 <= 5 * units;  // no thread waits for long
        const int64_t wanted = q.threads == 1 || (scatters && even) ? 1 : (4 * q.threads + units - 1) / units;
        return std::max<int64_t>(1, std::min(q.groups, wanted));
    }

    // Entries behind the last row are read and not used.
    void find_lanes() {
        lane_of.resize(q.out_channels + LANES);
        for (int64_t g = 0; g < q.groups; g++)
            for (int64_t i = row_ptr[g]; i < row_ptr[g + 1]; i++)
                lane_of[rows[i]] = static_cast<int32_t>(lane_ptr[g] + i - row_ptr[g]);
    }

    // Lines too short to fill a tile: a line is one pixel of each of many images instead.
    void take_together() {
        const int64_t in = input_rows(q.out_height) * copy_width(), out = q.out_height * q.out_width;
        const int64_t fit = std::max<int64_t>(1, TOGETHER_BYTES / SIZE / (in * q.channels + out * q.out_channels));
        const int64_t units = (q.images + fit - 1) / fit;
        together = (q.images + units - 1) / units;
        const int64_t vectors = (row_ptr[q.groups] / std::max<int64_t>(1, q.groups) + LANES - 1) / LANES;
        const int64_t most = ACCUMULATORS / std::clamp<int64_t>(vectors, 1, WIDEST);
        const auto of_a_tile = [=](int64_t pixels) { return pixels * 4 / ((pixels + most - 1) / most); };
        if (of_a_tile(together) > of_a_tile(q.out_width) * 5 / 4) copies = true;
        else together = 1;
    }

    void prepare_lanes() {
        lane_ptr.assign(1, 0);
        for (int64_t g = 0; g < q.groups; g++) {
            const int32_t* row = rows + row_ptr[g];
            const int64_t count = row_ptr[g + 1] - row_ptr[g];
            bool follow = true;
            lane_ptr.push_back(lane_ptr[g] + (count + PADDED_TO - 1) / PADDED_TO * PADDED_TO);
            lane_bias.resize(lane_ptr[g + 1], 0.0f);
            for (int64_t i = 0; i < count; i++) {
                if (bias) lane_bias[lane_ptr[g] + i] = widen(bias[row[i]]);
                follow = follow && row[i] == row[0] + i;
            }
            in_order.push_back(follow);
        }
        const int64_t scattered = std::count(in_order.begin(), in_order.end(), 0);
        scatters = q.out_channels >= SCATTERED_ROWS && 2 * scattered > q.groups;
    }

    // Parts of about equal work.
    void split_groups() {
        part_ptr.assign(parts + 1, q.groups);
        part_ptr[0] = 0;
        const int64_t all = value_ptr[q.groups];
        for (int64_t g = 0, part = 1; g < q.groups && part < parts; g++)
            while (part < parts && value_ptr[g + 1] * parts >= all * part) part_ptr[part++] = g + 1;
    }
};

}  // namespace
