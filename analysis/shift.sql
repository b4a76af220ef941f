-- Macros that compare two sides, a and b, each with the filters of questions.sql: two runs, two
-- conditions, or two masks.

-- Every expert of every layer: how many tokens chose it on each side, and the shares. `shift` is
-- share_b - share_a: what the expert gained of its layer's choices.
CREATE MACRO expert_shift(
    run_a := NULL, run_b := NULL, condition_a := NULL, condition_b := NULL,
    mask_a := NULL, mask_b := NULL, in_segment := NULL
) AS TABLE
SELECT
    layer, expert, a.count AS count_a, b.count AS count_b, a.share AS share_a, b.share AS share_b,
    b.share - a.share AS shift,
    a.gate_mass / nullif(sum(a.gate_mass) OVER (PARTITION BY layer), 0) AS mass_share_a,
    b.gate_mass / nullif(sum(b.gate_mass) OVER (PARTITION BY layer), 0) AS mass_share_b
FROM
    expert_load(
        in_run := run_a, in_condition := condition_a, in_mask := mask_a, in_segment := in_segment
    ) AS a
    JOIN expert_load(
        in_run := run_b, in_condition := condition_b, in_mask := mask_b, in_segment := in_segment
    ) AS b USING (layer, expert);

-- One row a layer. `total_variation`: the part of the layer's choices that moved to other experts,
-- half the sum of |shift|; `jensen_shannon`: the Jensen-Shannon distance (the root of the divergence
-- in bits). Both lie between 0 and 1. `mass_moved`: total variation of the gate mass. Experts are
-- added up in their order, so that the same store gives the same numbers to the last bit.
CREATE MACRO layer_shift(
    run_a := NULL, run_b := NULL, condition_a := NULL, condition_b := NULL,
    mask_a := NULL, mask_b := NULL, in_segment := NULL
) AS TABLE
SELECT
    layer,
    sum(abs(shift) ORDER BY expert) / 2 AS total_variation,
    sqrt(abs(sum(
        share_a * log2(if(share_a > 0, 2 * share_a / (share_a + share_b), 1))
        + share_b * log2(if(share_b > 0, 2 * share_b / (share_a + share_b), 1))
        ORDER BY expert
    )) / 2) AS jensen_shannon,
    sum(abs(mass_share_b - mass_share_a) ORDER BY expert) / 2 AS mass_moved,
    arg_max(expert, (shift, -expert)) AS gained_most,
    max(shift) AS gain,
    arg_min(expert, (shift, expert)) AS lost_most,
    min(shift) AS loss
FROM expert_shift(
    run_a := run_a, run_b := run_b, condition_a := condition_a, condition_b := condition_b,
    mask_a := mask_a, mask_b := mask_b, in_segment := in_segment
)
GROUP BY layer;

-- The tokens that stand at the same position of the same example on both sides, after the same
-- tokens. Requests pair by example_id, and by condition too where no side names one. An example with
-- several requests on a side has no pair, nor has a request without example_id.
CREATE MACRO paired_tokens(
    run_a := NULL, run_b := NULL, condition_a := NULL, condition_b := NULL,
    mask_a := NULL, mask_b := NULL, in_segment := NULL
) AS TABLE
WITH
    side_a AS (
        SELECT t.*, r.example_id,
            if(condition_a IS NULL AND condition_b IS NULL, r.condition, NULL) AS pairs_in
        FROM chosen_tokens(in_run := run_a, in_condition := condition_a, in_mask := mask_a) AS t
            JOIN requests AS r USING (request_id)
        WHERE r.example_id IS NOT NULL AND t.token_id >= 0
    ),
    side_b AS (
        SELECT t.*, r.example_id,
            if(condition_a IS NULL AND condition_b IS NULL, r.condition, NULL) AS pairs_in
        FROM chosen_tokens(in_run := run_b, in_condition := condition_b, in_mask := mask_b) AS t
            JOIN requests AS r USING (request_id)
        WHERE r.example_id IS NOT NULL AND t.token_id >= 0
    ),
    alone_a AS (
        SELECT example_id, pairs_in, any_value(request_id) AS request_id
        FROM side_a GROUP BY example_id, pairs_in HAVING count(DISTINCT request_id) = 1
    ),
    alone_b AS (
        SELECT example_id, pairs_in, any_value(request_id) AS request_id
        FROM side_b GROUP BY example_id, pairs_in HAVING count(DISTINCT request_id) = 1
    ),
    pairs AS (
        SELECT a.request_id AS request_a, b.request_id AS request_b
        FROM alone_a AS a JOIN alone_b AS b
            ON a.example_id = b.example_id AND a.pairs_in IS NOT DISTINCT FROM b.pairs_in
        WHERE a.request_id != b.request_id
    ),
    places AS (
        SELECT
            request_a, request_b, a.position AS position, a.token_id AS token_id,
            a.segment AS segment_a, a.expert_ids AS experts_a, b.expert_ids AS experts_b,
            bool_and(a.token_id = b.token_id)
                OVER (PARTITION BY request_a ORDER BY a.position) AS same_so_far
        FROM pairs JOIN side_a AS a ON a.request_id = request_a
            JOIN side_b AS b ON b.request_id = request_b AND b.position = a.position
    )
SELECT request_a, request_b, position, token_id, segment_a AS segment, experts_a, experts_b
FROM places
WHERE same_so_far AND (in_segment IS NULL OR segment_a = in_segment);

-- Their experts, a row a token and layer.
CREATE MACRO paired_routes(
    run_a := NULL, run_b := NULL, condition_a := NULL, condition_b := NULL,
    mask_a := NULL, mask_b := NULL, in_segment := NULL
) AS TABLE
SELECT
    unnest(moe_layers)::INTEGER AS layer,
    unnest(list_transform(range(len(moe_layers)), lambda i:
        experts_a[i * top_k + 1 : (i + 1) * top_k]::INTEGER[])) AS experts_a,
    unnest(list_transform(range(len(moe_layers)), lambda i:
        experts_b[i * top_k + 1 : (i + 1) * top_k]::INTEGER[])) AS experts_b
FROM model, paired_tokens(
    run_a := run_a, run_b := run_b, condition_a := condition_a, condition_b := condition_b,
    mask_a := mask_a, mask_b := mask_b, in_segment := in_segment
);

-- One row a layer. `same_experts`: the part of those tokens that chose the same set on both sides;
-- `kept`: the mean part of the experts of side a that side b chose too.
CREATE MACRO kept_experts(
    run_a := NULL, run_b := NULL, condition_a := NULL, condition_b := NULL,
    mask_a := NULL, mask_b := NULL, in_segment := NULL
) AS TABLE
SELECT
    layer, count(*) AS tokens,
    avg((len(list_intersect(experts_a, experts_b)) = top_k)::INTEGER) AS same_experts,
    avg(len(list_intersect(experts_a, experts_b))) / any_value(top_k) AS kept
FROM model, paired_routes(
    run_a := run_a, run_b := run_b, condition_a := condition_a, condition_b := condition_b,
    mask_a := mask_a, mask_b := mask_b, in_segment := in_segment
)
GROUP BY layer;

-- Where a lost expert's tokens went: those that chose `lost` on side a only, and `gained` on side b
-- only. A token that lost and gained several experts counts for each pair of them.
CREATE MACRO replaced_experts(
    run_a := NULL, run_b := NULL, condition_a := NULL, condition_b := NULL,
    mask_a := NULL, mask_b := NULL, in_segment := NULL
) AS TABLE
SELECT layer, lost, gained, count(*) AS tokens
FROM (
    SELECT layer, lost, unnest(gains) AS gained
    FROM (
        SELECT
            layer,
            unnest(list_filter(experts_a, lambda x: NOT list_contains(experts_b, x))) AS lost,
            list_filter(experts_b, lambda x: NOT list_contains(experts_a, x)) AS gains
        FROM paired_routes(
            run_a := run_a, run_b := run_b, condition_a := condition_a, condition_b := condition_b,
            mask_a := mask_a, mask_b := mask_b, in_segment := in_segment
        )
    )
)
GROUP BY layer, lost, gained;
