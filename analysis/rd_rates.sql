-- Rates and risk differences of every (layer, expert), from the requests that rd_requests.sql
-- chose (registered as `rd_requests`).
--
-- The rate of a unit is the mean, over its tokens, of A: 1 if the token selected the expert (or,
-- with gate mass, the weight that it gave), else 0. A condition's rate is the mean over its units.
-- Exact whatever the order of rows: counts are integers, gate weights are multiples of 2^-24, so
-- their sums in float64 are exact too, and the units' rates are added in unit order.
WITH
    used AS (FROM rd_requests WHERE left_out IS NULL),
    chosen AS (
        SELECT
            unit, positive,
            unnest((SELECT layers FROM routes)) AS layer,
            unnest(expert_ids) AS expert,
            unnest(CASE WHEN $gate_mass THEN gate_weights END) AS gate_weight
        FROM tokens JOIN used USING (request_id)
        WHERE
            $segment IN ('all', segment)
            AND (NOT $length_match OR position <= last_position)
    ),
    counts AS (
        SELECT
            unit, positive, layer, expert,
            count(*) AS count,
            sum(gate_weight::DOUBLE) AS gate_mass
        FROM chosen
        GROUP BY unit, positive, layer, expert
    ),
    units AS (
        SELECT unit, positive, count(*) AS examples, sum(tokens)::BIGINT AS tokens
        FROM used
        GROUP BY unit, positive
    ),
    totals AS (
        SELECT
            count(*) FILTER (positive) AS units_positive,
            count(*) FILTER (NOT positive) AS units_negative,
            sum(tokens) FILTER (positive)::BIGINT AS tokens_positive,
            sum(tokens) FILTER (NOT positive)::BIGINT AS tokens_negative,
            sum(examples) FILTER (positive)::BIGINT AS examples_positive,
            sum(examples) FILTER (NOT positive)::BIGINT AS examples_negative
        FROM units
    ),
    sums AS (
        SELECT
            layer, expert,
            sum(count) FILTER (positive) AS count_positive,
            sum(count) FILTER (NOT positive) AS count_negative,
            sum(rate ORDER BY unit) FILTER (positive) AS rates_positive,
            sum(rate ORDER BY unit) FILTER (NOT positive) AS rates_negative
        FROM (
            SELECT *, if($gate_mass, gate_mass, count::DOUBLE) / tokens AS rate
            FROM counts JOIN units USING (unit, positive)
        )
        GROUP BY layer, expert
    ),
    experts AS (
        SELECT layer, unnest(range(num_experts)) AS expert
        FROM (SELECT unnest(moe_layers) AS layer, num_experts FROM model)
    )
SELECT
    layer::INTEGER AS layer,
    expert::INTEGER AS expert,
    coalesce(count_positive, 0)::BIGINT AS a1,
    tokens_positive - a1 AS d1,
    coalesce(count_negative, 0)::BIGINT AS a2,
    tokens_negative - a2 AS d2,
    coalesce(rates_positive / units_positive, 0) AS rate_positive,
    coalesce(rates_negative / units_negative, 0) AS rate_negative,
    rate_positive - rate_negative AS rd,
    tokens_positive, tokens_negative,
    examples_positive, examples_negative
FROM experts LEFT JOIN sums USING (layer, expert) CROSS JOIN totals
ORDER BY abs(rd) DESC, layer, expert
