"""The pruners' formulas once more, in plain Python loops over the lists of one image; nothing is the library's."""

import math


def dot(a, b):
    return sum(u * v for u, v in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def falling(values):
    """Places by falling value, equals by rising place."""
    return sorted(range(len(values)), key=lambda j: (-values[j], j))


def head_mean(keys):
    """(tokens, heads, headdim) -> (tokens, headdim)."""
    return [mean(heads) for heads in keys]


def joined(keys):
    return [[v for head in heads for v in head] for heads in keys]


def visionzip(x, cls, scores, keys, dominant, contextual):
    """(tokens, sources): `dominant` counts [CLS]; `keys` are those of patches."""
    chosen = sorted(falling(scores)[: dominant - 1])
    rest = [j for j in range(len(x)) if j not in chosen]
    step = len(rest) // contextual
    targets = [rest[i] for i in range(0, len(rest), step)][:contextual]
    metric = head_mean(keys)
    members = {t: [] for t in targets}
    for j in rest:
        if j not in targets:
            best = max(targets, key=lambda t: (cosine(metric[j], metric[t]), -t))
            members[best].append(x[j])
    merged = [[u + v for u, v in zip(x[t], mean(members[t]), strict=True)] if members[t] else x[t] for t in targets]
    return [cls] + [x[j] for j in chosen] + merged, [-1, *chosen, *targets]


def prumerge_weights(query, keys, prefix):
    q, k = [v for head in query for v in head], joined(keys)
    logits = [dot(q, row) / math.sqrt(len(q)) for row in k]
    total = sum(math.exp(v) for v in logits)
    return [math.exp(v) / total for v in logits][prefix:]


def percentile(values, share):
    at = share * (len(values) - 1)
    ordered = sorted(values)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def outliers(values):
    q1, q3 = percentile(values, 0.25), percentile(values, 0.75)
    return sum(v > q3 + 1.5 * (q3 - q1) for v in values)


def prumerge(x, weights, keys, kept, neighbours):
    """(tokens, sources) of the patches `kept`, in that order, and the token for the rest."""
    k = joined(keys)
    tokens = []
    for i in kept:
        others = sorted((j for j in range(len(x)) if j != i), key=lambda j: (-cosine(k[i], k[j]), j))[:neighbours]
        token = list(x[i])
        for n in others:
            token = [u + weights[n] * v for u, v in zip(token, x[n], strict=True)]
        tokens.append(token)
    rest = [0.0] * len(x[0])
    for n in range(len(x)):
        if n not in kept:
            rest = [u + weights[n] * v for u, v in zip(rest, x[n], strict=True)]
    return [*tokens, rest], [*kept, -1]


def vispruner(x, scores, total, ratio):
    important = int(total * ratio)
    order = falling(scores)
    chosen, rest = order[:important], order[important:]
    wanted = total - important
    while wanted and len(rest) > wanted:
        even, odd = rest[0::2], rest[1::2]
        redundancy = [max(cosine(x[a], x[b]) for b in odd) for a in even]
        drop = min(8, len(rest) - wanted)
        rest = [even[i] for i in falling(redundancy)[drop:]] + odd
    return sorted(chosen + (rest if wanted else []))


def divprune(x, count):
    distance = [[1 - cosine(a, b) for b in x] for a in x]
    lonely = [min(d for j, d in enumerate(row) if j != i) for i, row in enumerate(distance)]
    chosen = [falling(lonely)[0]]
    while len(chosen) < count:
        left = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(left, key=lambda i: (min(distance[i][m] for m in chosen), -i)))
    return sorted(chosen)


def hiprune(middle, late, total, alpha, height, width):
    chosen = set()
    for anchor in falling(middle)[: min(math.floor(total * alpha / 5 + 0.5), total // 5)]:
        row, column = divmod(anchor, width)
        for r, c in ((row, column), (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < height and 0 <= c < width:
                chosen.add(r * width + c)
    for j in falling(late):
        if len(chosen) < total:
            chosen.add(j)
    return sorted(chosen)


def tome_round(x, metric, sizes, places, r, protect):
    """One round in raster order: (x, metric, sizes, places), all means weighted with sizes."""
    links = []
    for a in range(0, len(x), 2):
        odd = [b for b in range(1, len(x), 2) if b >= protect]
        if a >= protect and odd:
            best = max(odd, key=lambda b: (cosine(metric[a], metric[b]), -b))
            links.append((cosine(metric[a], metric[best]), a, best))
    links = sorted(links, key=lambda link: (-link[0], link[1]))[:r]
    into = {a: b for _, a, b in links}
    out = []
    for i in range(len(x)):
        if i in into:
            continue
        members = [i, *(a for a, b in into.items() if b == i)]
        total = sum(sizes[m] for m in members)
        both = [
            [sum(sizes[m] * rows[m][c] for m in members) / total for c in range(len(rows[i]))] for rows in (x, metric)
        ]
        out.append((*both, total, places[i]))
    return [list(column) for column in zip(*out, strict=True)]


def raters(visual, text):
    """Which of the text tokens rate."""
    share = [0.0] * len(text)
    for v in visual:
        logits = [dot(v, t) for t in text]
        top = max(logits)
        total = sum(math.exp(u - top) for u in logits)
        share = [s + math.exp(u - top) / total / len(visual) for s, u in zip(share, logits, strict=True)]
    return [s > sum(share) / len(share) for s in share]


def freed_scores(weights, positions, raters, visual, heads, headdim, base=10000.0):
    """SparseVLM+'s scores of visual tokens from whole maps, weights[head][row][key]; raters and visual are columns."""

    def gravity(i, j):  # of two vectors of ones, turned by angles that differ by (p_i - p_j) f
        angles = [(positions[i] - positions[j]) * base ** (-2 * f / headdim) for f in range(headdim // 2)]
        return 2 * sum(math.cos(angle) for angle in angles) / math.sqrt(headdim)

    freed = [{(i, j): rows[i][j] / gravity(i, j) for i in raters for j in visual} for rows in weights]
    best = falling([sum(of_head.values()) for of_head in freed])[:heads]
    return [sum(freed[h][i, j] for h in best for i in raters) / (len(best) * len(raters)) for j in visual]


def sparse_merge(x, scores):
    """SparseVLM's merged tokens of what is dropped, with how many are in each."""
    best = falling(scores)[: int(0.3 * len(x)) + 1]
    x = [x[j] for j in best]
    clusters = int(len(x) / 10) + 1
    distance = [[math.dist(a, b) / math.sqrt(len(a)) for b in x] for a in x]
    density = [math.exp(-sum(d * d for d in sorted(row)[:clusters]) / clusters) for row in distance]
    farthest = max(max(row) for row in distance)
    centre_score = []
    for i in range(len(x)):
        denser = [
            distance[i][j] for j in range(len(x)) if density[j] > density[i] or (density[j] == density[i] and j < i)
        ]
        centre_score.append(density[i] * min(denser, default=farthest))
    centres = falling(centre_score)[:clusters]
    members = [[] for _ in centres]
    for i in range(len(x)):
        nearest = centres.index(i) if i in centres else min(range(clusters), key=lambda c: (distance[i][centres[c]], c))
        members[nearest].append(x[i])
    return [mean(rows) for rows in members], [len(rows) for rows in members]
