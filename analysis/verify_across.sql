-- What is wrong with requests across files: a row for each request that is there twice, or that lacks
-- a stage of its pipeline. verify.py registers `files`: each file's name, stage and stages (1 and 1
-- where one process has all layers).
WITH found AS (
    SELECT request_id, name, stage, stages
    FROM read_parquet($files, filename = true, hive_partitioning = false) JOIN files USING (filename)
)
SELECT
    'request twice' AS check, max(name) AS file, request_id,
    'is in ' || string_agg(name, ', ' ORDER BY name) AS what
FROM found
GROUP BY request_id
HAVING count(*) > count(DISTINCT stage) OR count(DISTINCT stages) > 1
UNION ALL
SELECT
    'missing stage', max(name), request_id,
    format('is in {} of {} pipeline stages', count(DISTINCT stage), max(stages))
FROM found
WHERE NOT list_contains($unfinished, stages)
GROUP BY request_id
HAVING count(DISTINCT stage) < max(stages)
ORDER BY ALL
