-- The requests of both conditions, one row each: why one is left out (NULL if it counts), and which
-- of its tokens count. rd_requests.py fills in {condition}, a quoted column, and registers
-- `rd_lengths` (rd_lengths.sql) and `rd_strata` (request_id, stratum).
WITH
    chosen AS (
        SELECT
            request_id, run, example_id, stratum,
            {condition}::VARCHAR = $positive AS positive,
            complete OR $include_incomplete AS usable
        FROM requests JOIN rd_strata USING (request_id)
        WHERE ($run IS NULL OR run = $run) AND {condition}::VARCHAR IN ($positive, $negative)
    ),
    paired AS (
        SELECT
            * EXCLUDE (length),
            nullif(length, 0) AS length,
            count(nullif(length, 0)) FILTER (usable AND positive) OVER pair AS num_positive,
            count(nullif(length, 0)) FILTER (usable AND NOT positive) OVER pair AS num_negative,
            min(nullif(length, 0)) FILTER (usable) OVER pair AS shorter
        FROM chosen LEFT JOIN rd_lengths USING (request_id)
        WINDOW pair AS (PARTITION BY example_id)
    )
SELECT
    request_id, run, example_id, stratum, positive,
    CASE
        WHEN NOT usable THEN 'incomplete'
        WHEN length IS NULL THEN 'no token in the segment'
        WHEN $length_match AND (example_id IS NULL OR least(num_positive, num_negative) = 0)
            THEN 'unpaired'
        WHEN stratum IS NULL THEN 'in no stratum'
    END AS left_out,
    $length_match AND left_out IS NULL AND greatest(num_positive, num_negative) > 1 AS repeated,
    if($length_match, shorter, length) AS tokens,
    start, positions[1] AS first_position, positions[tokens] AS last_position
FROM paired
ORDER BY request_id
