-- Macros over the views: what people ask of a store. docs/sql.md has examples of each.
--
-- All take the same filters, each of which is off when left out: `in_run` and `in_condition`, of the
-- request; `in_segment` and `in_mask`, of the token (the mask that was in force there; 'none' where
-- none was, and a name without its version means all versions).

CREATE MACRO chosen_tokens(
    in_run := NULL, in_condition := NULL, in_mask := NULL, in_segment := NULL
) AS TABLE
SELECT t.request_id, t.position, t.token_id, t.segment, t.mask, t.expert_ids, t.gate_weights
FROM tokens AS t
WHERE
    (in_segment IS NULL OR t.segment = in_segment)
    AND (in_mask IS NULL OR coalesce(t.mask, 'none') = in_mask OR split_part(t.mask, '@', 1) = in_mask)
    AND t.request_id IN (
        SELECT r.request_id FROM requests AS r
        WHERE (in_run IS NULL OR r.run = in_run) AND (in_condition IS NULL OR r.condition = in_condition)
    );

-- As the view `routing`, of these tokens.
CREATE MACRO chosen_routes(
    in_run := NULL, in_condition := NULL, in_mask := NULL, in_segment := NULL
) AS TABLE
SELECT
    t.request_id, t.position, t.token_id,
    unnest((SELECT layers FROM routes)) AS layer,
    unnest((SELECT ranks FROM routes)) AS rank,
    unnest(t.expert_ids)::INTEGER AS expert,
    unnest(t.gate_weights) AS gate_weight
FROM chosen_tokens(
    in_run := in_run, in_condition := in_condition, in_mask := in_mask, in_segment := in_segment
) AS t;

-- Every expert of every layer, also those that no token chose. `share`: of the layer's choices;
-- `load`: share over the even share, so that 1 is even.
CREATE MACRO expert_load(
    in_run := NULL, in_condition := NULL, in_mask := NULL, in_segment := NULL
) AS TABLE
WITH
    counted AS (
        SELECT layer, expert, count(*) AS count, sum(gate_weight::DOUBLE) AS mass
        FROM chosen_routes(
            in_run := in_run, in_condition := in_condition, in_mask := in_mask,
            in_segment := in_segment
        )
        GROUP BY layer, expert
    ),
    experts AS (
        SELECT layer, unnest(range(num_experts))::INTEGER AS expert, num_experts, weights
        FROM (SELECT unnest(moe_layers)::INTEGER AS layer, num_experts, weights FROM model)
    )
SELECT
    layer, expert, coalesce(c.count, 0) AS count,
    coalesce(c.count, 0) / nullif(sum(c.count) OVER (PARTITION BY layer), 0) AS share,
    share * num_experts AS load,
    if(weights, coalesce(mass, 0), NULL) AS gate_mass
FROM experts LEFT JOIN counted AS c USING (layer, expert);

-- One row a layer. `evenness` is the entropy of the shares over its maximum, ln(number of experts);
-- `effective`: the number of experts whose even use has the same entropy; `dead`: experts that no
-- token chose; `overused`: experts of at least `overload` times the even share.
CREATE MACRO layer_load(
    in_run := NULL, in_condition := NULL, in_mask := NULL, in_segment := NULL, overload := 3
) AS TABLE
SELECT
    layer,
    (sum(count) / (SELECT top_k FROM model))::BIGINT AS tokens,
    abs(sum(share * ln(if(share > 0, share, 1)) ORDER BY expert)) AS entropy,
    entropy / nullif(ln(count(*)), 0) AS evenness,
    exp(entropy) AS effective,
    count(*) FILTER (count = 0) AS dead,
    count(*) FILTER (load >= overload) AS overused,
    arg_max(expert, (load, -expert)) AS busiest,
    max(load) AS busiest_load
FROM expert_load(
    in_run := in_run, in_condition := in_condition, in_mask := in_mask, in_segment := in_segment
)
GROUP BY layer;

-- Pairs of a layer's experts that were chosen at all: how many tokens chose both. `lift`: that
-- number over the one that two independent experts would have; `pmi`: log2 of it.
CREATE MACRO coactivation(
    of_layer, in_run := NULL, in_condition := NULL, in_mask := NULL, in_segment := NULL
) AS TABLE
WITH
    place AS (
        SELECT (list_position(moe_layers, of_layer) - 1) * top_k AS before, top_k FROM model
    ),
    chosen AS (
        SELECT list_slice(t.expert_ids, before + 1, before + top_k)::INTEGER[] AS experts
        FROM chosen_tokens(
            in_run := in_run, in_condition := in_condition, in_mask := in_mask,
            in_segment := in_segment
        ) AS t,
            place
        WHERE before IS NOT NULL
    ),
    total AS (SELECT count(*) AS tokens FROM chosen),
    each AS (SELECT unnest(experts) AS expert, experts FROM chosen),
    singles AS (SELECT expert, count(*) AS count FROM each GROUP BY expert),
    pairs AS (
        SELECT expert, other, count(*) AS together
        FROM (SELECT expert, unnest(experts) AS other FROM each)
        WHERE expert < other
        GROUP BY expert, other
    )
SELECT
    a.expert, b.expert AS other, coalesce(t.together, 0) AS together,
    a.count AS count, b.count AS other_count, tokens,
    coalesce(t.together, 0) * tokens / (a.count * b.count) AS lift,
    if(t.together > 0, log2(lift), NULL) AS pmi
FROM singles AS a JOIN singles AS b ON a.expert < b.expert
    CROSS JOIN total
    LEFT JOIN pairs AS t ON t.expert = a.expert AND t.other = b.expert;

-- The token ids that chose an expert. `rate`: the part of this id's tokens that did; `lift`: that
-- over the part of all tokens. Tokens without an id (-1) don't count.
CREATE MACRO expert_tokens(
    of_layer, of_expert, in_run := NULL, in_condition := NULL, in_mask := NULL, in_segment := NULL
) AS TABLE
WITH
    place AS (
        SELECT (list_position(moe_layers, of_layer) - 1) * top_k AS before, top_k FROM model
    ),
    seen AS (
        SELECT
            t.token_id,
            list_position(list_slice(t.expert_ids, before + 1, before + top_k), of_expert) AS found,
            t.gate_weights[before + found] AS weight
        FROM chosen_tokens(
            in_run := in_run, in_condition := in_condition, in_mask := in_mask,
            in_segment := in_segment
        ) AS t,
            place
        WHERE before IS NOT NULL AND t.token_id >= 0
    )
SELECT
    token_id, count(found) AS count, count(*) AS total, count / total AS rate,
    rate / (SELECT count(found) / count(*) FROM seen) AS lift,
    avg(weight::DOUBLE) AS mean_weight
FROM seen GROUP BY token_id HAVING count(found) > 0;

-- One request, a row a token and layer, with the experts in the order of their ranks.
CREATE MACRO request_routing(of_request) AS TABLE
SELECT
    t.position, t.token_id, t.segment, t.mask, unnest(moe_layers)::INTEGER AS layer,
    unnest(list_transform(range(len(moe_layers)), lambda i:
        t.expert_ids[i * top_k + 1 : (i + 1) * top_k]::INTEGER[])) AS experts,
    unnest(list_transform(range(len(moe_layers)), lambda i:
        t.gate_weights[i * top_k + 1 : (i + 1) * top_k])) AS weights
FROM tokens AS t, model
WHERE t.request_id = of_request;

-- Where some token ids chose an expert: for each id the `at_most` places of largest weight, with the
-- ids of `around` tokens of the request before and after.
CREATE MACRO expert_contexts(
    of_layer, of_expert, of_ids, at_most := 3, around := 8,
    in_run := NULL, in_condition := NULL, in_mask := NULL, in_segment := NULL
) AS TABLE
WITH
    place AS (
        SELECT (list_position(moe_layers, of_layer) - 1) * top_k AS before, top_k FROM model
    ),
    seen AS (
        SELECT
            t.request_id, t.position, t.token_id,
            list_position(list_slice(t.expert_ids, before + 1, before + top_k), of_expert) AS rank,
            t.gate_weights[before + rank] AS weight
        FROM chosen_tokens(
            in_run := in_run, in_condition := in_condition, in_mask := in_mask,
            in_segment := in_segment
        ) AS t, place
        WHERE list_contains(of_ids, t.token_id)
    ),
    found AS (
        SELECT * FROM seen
        WHERE rank IS NOT NULL
        QUALIFY row_number() OVER (
            PARTITION BY token_id ORDER BY weight DESC, request_id, position
        ) <= at_most
    )
SELECT
    f.request_id, f.position, f.weight,
    coalesce(list(t.token_id ORDER BY t.position) FILTER (t.position < f.position), []) AS before,
    f.token_id,
    coalesce(list(t.token_id ORDER BY t.position) FILTER (t.position > f.position), []) AS after
FROM found AS f JOIN tokens AS t ON t.request_id = f.request_id
    AND t.position BETWEEN f.position - around AND f.position + around
GROUP BY f.request_id, f.position, f.weight, f.token_id;
