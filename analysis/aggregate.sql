-- The routing of every token with the number of its row in the aggregate: `aggregate_rows` numbers
-- each segment of each request (aggregate.py registers it).
SELECT unit, expert_ids, gate_weights
FROM tokens JOIN aggregate_rows USING (segment, request_id)
