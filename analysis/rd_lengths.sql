-- How many tokens of each request count before length matching, and where, from the view `tokens`.
--
-- The *stretch* of a request is the segment's tokens in order, and before the first of them the
-- $lead tokens that precede it, whatever their segment. Of the stretch the slice
-- [$slice_start, $slice_stop) counts, as Python counts; of the slice, the tokens that pass the
-- filters by token id. The places are only listed when they matter ($ordered).
WITH
    starts AS (
        SELECT request_id, min(position) AS start
        FROM tokens
        WHERE $lead > 0 AND segment = $segment
        GROUP BY request_id
    ),
    stretches AS (
        SELECT
            request_id, any_value(start) AS start,
            count(*) AS stretch,
            count(*) FILTER (passes) AS passing,
            list(position ORDER BY position) FILTER ($ordered) AS places,
            list(passes ORDER BY position) FILTER ($ordered) AS passed
        FROM (
            SELECT
                request_id, position, start,
                (len($token_ids::INTEGER[]) = 0 OR list_contains($token_ids::INTEGER[], token_id))
                    AND NOT list_contains($exclude_token_ids::INTEGER[], token_id) AS passes
            FROM tokens LEFT JOIN starts USING (request_id)
            WHERE $segment IN ('all', segment) OR position BETWEEN start - $lead AND start - 1
        )
        GROUP BY request_id
    ),
    slices AS (
        SELECT
            *,
            CASE WHEN $slice_start < 0 THEN greatest(stretch + $slice_start, 0)
                ELSE least(coalesce($slice_start, 0), stretch) END AS low,
            CASE WHEN $slice_stop < 0 THEN greatest(stretch + $slice_stop, 0)
                ELSE least(coalesce($slice_stop, stretch), stretch) END AS high
        FROM stretches
    )
SELECT
    request_id, start,
    CASE
        WHEN NOT $ordered THEN NULL
        WHEN high > low THEN list_where(places[low + 1 : high], passed[low + 1 : high])
        ELSE []
    END AS positions,
    if($ordered, len(positions), passing) AS length
FROM slices
