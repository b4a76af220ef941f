-- The views of a trace store. views.py fills in $tokens and $requests (the committed files) and
-- registers `facts`, the manifest's model as one row.

CREATE TABLE model AS SELECT * REPLACE (revision::VARCHAR AS revision) FROM facts;

-- One row: the layer and the rank of each entry of a token's lists, which are layer-major.
CREATE TABLE routes AS
SELECT
    list_transform(range(len(moe_layers) * top_k), lambda i: moe_layers[i // top_k + 1]::INTEGER)
        AS layers,
    list_transform(range(len(moe_layers) * top_k), lambda i: (i % top_k)::INTEGER) AS ranks
FROM model;

CREATE VIEW tokens AS
SELECT
    request_id, position, token_id, segment, mask, expert_ids,
    gate_weights::FLOAT[] AS gate_weights
FROM $tokens;

CREATE VIEW requests AS
SELECT
    request_id, run, example_id, condition, mask, prompt_tokens, tokens, complete, spans
FROM $requests;

-- One row a route (token x layer x rank). The lists of a token are unnested side by side; no join.
CREATE VIEW routing AS
SELECT
    request_id, position, token_id, segment, mask,
    unnest((SELECT layers FROM routes)) AS layer,
    unnest((SELECT ranks FROM routes)) AS rank,
    unnest(expert_ids)::INTEGER AS expert,
    unnest(gate_weights) AS gate_weight
FROM tokens;

-- One row a chosen (request, segment, layer, expert): an expert that was never chosen has none.
CREATE VIEW activation AS
WITH
    lengths AS (
        SELECT request_id, segment, count(*) AS tokens FROM tokens GROUP BY request_id, segment
    ),
    chosen AS (
        SELECT
            request_id, segment, layer, expert,
            count(*) AS count,
            sum(gate_weight::DOUBLE) AS gate_mass
        FROM routing
        GROUP BY request_id, segment, layer, expert
    )
SELECT
    request_id, segment, layer, expert, tokens, count,
    count / tokens AS rate,
    gate_mass
FROM chosen JOIN lengths USING (request_id, segment);
