-- What is wrong with the requests of one pair of files: a row for each (request, check) that fails.
-- Reads only narrow columns. The checks are named in verify.py, which also knows the remedies.
WITH
    rows AS (
        SELECT
            request_id, position, file_row_number,
            lag(position) OVER (PARTITION BY request_id ORDER BY file_row_number) AS previous
        FROM read_parquet($tokens, file_row_number = true, hive_partitioning = false)
    ),
    found AS (
        SELECT
            request_id,
            count(*) AS rows,
            min(position) AS first,
            max(position) AS last,
            count(*) FILTER (position <= previous) AS unordered,
            max(file_row_number) - min(file_row_number) + 1 AS extent
        FROM rows
        GROUP BY request_id
    ),
    requests AS (
        SELECT
            request_id, prompt_tokens, tokens, complete, true AS stated,
            list_filter(spans, lambda s:
                s.start < 0 OR s.stop < s.start OR (complete AND s.stop > tokens)
            ) AS bad_spans
        FROM read_parquet($requests, hive_partitioning = false)
    ),
    failed AS (
        SELECT
            request_id,
            unnest([
                if(stated IS NULL, {
                    name: 'orphan rows',
                    what: format('{} rows, but no request', rows)
                }, NULL),
                if(tokens != coalesce(rows, 0), {
                    name: 'row count',
                    what: format('says {} tokens, but has {} rows', tokens, coalesce(rows, 0))
                }, NULL),
                if(extent != rows, {
                    name: 'scattered rows',
                    what: format('{} rows lie within {}', rows, extent)
                }, NULL),
                if(unordered > 0, {
                    name: 'positions',
                    what: format('{} positions repeat or fall', unordered)
                }, NULL),
                if(first < 0 OR (complete AND (first != 0 OR last != rows - 1)), {
                    name: 'gaps',
                    what: format('{} rows have the positions {} to {}', rows, first, last)
                }, NULL),
                if(complete AND prompt_tokens > tokens, {
                    name: 'prompt length',
                    what: format('{} tokens, but a prompt of {}', tokens, prompt_tokens)
                }, NULL),
                if(len(bad_spans) > 0, {
                    name: 'spans',
                    what: format(
                        'span {} [{}, {}) of {} tokens',
                        bad_spans[1].segment, bad_spans[1].start, bad_spans[1].stop, tokens
                    )
                }, NULL)
            ]) AS failure
        FROM found FULL JOIN requests USING (request_id)
    )
SELECT
    failure.name AS name,
    min(request_id) AS request,
    arg_min(failure.what, request_id) AS what,
    count(*) AS count
FROM failed
WHERE failure IS NOT NULL
GROUP BY failure.name
ORDER BY failure.name
