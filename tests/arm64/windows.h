// What the programs share: PROGRAM MODEL IDS WINDOW BEGIN OUT. IDS holds windows of int32 ids. The first BEGIN of a window are
// read at once, the others one by one, so that both kinds of kernels work; OUT gets the float32 logits behind every call.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

using Logits = std::pair<const float *, size_t>;

inline std::vector<int32_t> read_ids(const char *path) {
    FILE *file = std::fopen(path, "rb");
    if (!file) std::exit(2);
    std::vector<int32_t> ids;
    for (int32_t id; std::fread(&id, sizeof id, 1, file) == 1;) ids.push_back(id);
    std::fclose(file);
    return ids;
}

// reset() empties the cache; feed(ids, count, position) writes ids behind `position` cached ones, and gives the last one's logits.
template <class Reset, class Feed> int write_logits(char **arguments, Reset reset, Feed feed) {
    const std::vector<int32_t> ids = read_ids(arguments[2]);
    const size_t window = std::atoi(arguments[3]), begin = std::atoi(arguments[4]);
    FILE *out = std::fopen(arguments[5], "wb");
    if (!out) return 2;
    for (size_t start = 0; start + window <= ids.size(); start += window) {
        reset();
        for (size_t at = 0, count = begin; at < window; at += count, count = 1) {
            const Logits logits = feed(ids.data() + start + at, count, at);
            if (std::fwrite(logits.first, sizeof(float), logits.second, out) != logits.second) return 2;
        }
    }
    return std::fclose(out);
}
