-- The requests of both conditions, one row each: why one is left out (NULL if it counts), how many
-- tokens of its segment count, and in which unit. rd.py fills in {condition}, a quoted column.
--
-- A *unit* is what one rate is measured on: all requests of a condition together (estimator
-- `token`), or each request by itself (estimator `sequence`), numbered in request id order.
WITH
    chosen AS (
        SELECT
            request_id, run, example_id,
            {condition}::VARCHAR = $positive AS positive,
            complete OR $include_incomplete AS usable
        FROM requests
        WHERE ($run IS NULL OR run = $run) AND {condition}::VARCHAR IN ($positive, $negative)
    ),
    lengths AS (
        SELECT
            request_id,
            count(*) AS length,
            list_sort(list(position) FILTER ($length_match)) AS positions
        FROM tokens
        WHERE $segment IN ('all', segment)
        GROUP BY request_id
    ),
    paired AS (
        SELECT
            *,
            count(length) FILTER (usable AND positive) OVER pair AS num_positive,
            count(length) FILTER (usable AND NOT positive) OVER pair AS num_negative,
            min(length) FILTER (usable) OVER pair AS shorter
        FROM chosen LEFT JOIN lengths USING (request_id)
        WINDOW pair AS (PARTITION BY example_id)
    )
SELECT
    request_id, run, example_id, positive,
    CASE
        WHEN NOT usable THEN 'incomplete'
        WHEN length IS NULL THEN 'no token in the segment'
        WHEN $length_match AND (example_id IS NULL OR least(num_positive, num_negative) = 0)
            THEN 'unpaired'
    END AS left_out,
    $length_match AND left_out IS NULL AND greatest(num_positive, num_negative) > 1 AS repeated,
    if($length_match, shorter, length) AS tokens,
    positions[shorter] AS last_position,
    if($estimator = 'token', positive::BIGINT, row_number() OVER (ORDER BY request_id)) AS unit
FROM paired
ORDER BY request_id
