-- The routing of every token that counts, with its request's number: from the requests that
-- rd_requests.py numbered (registered as `rd_units`). The conditions are those of rd_lengths.sql.
SELECT unit, expert_ids, CASE WHEN $gate_mass THEN gate_weights END AS gate_weights
FROM tokens JOIN rd_units USING (request_id)
WHERE
    ($segment IN ('all', segment) OR position BETWEEN start - $lead AND start - 1)
    AND (last_position IS NULL OR position BETWEEN first_position AND last_position)
    AND (len($token_ids::INTEGER[]) = 0 OR list_contains($token_ids::INTEGER[], token_id))
    AND NOT list_contains($exclude_token_ids::INTEGER[], token_id)
