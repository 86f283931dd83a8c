-- Says what there is of a run.
-- KEYS: the run, its events.
-- Returns what it began with, the number of its newest event, its end, and the id of the oldest event that is kept; nil
-- for a run that the store does not have.
local run = redis.call('HMGET', KEYS[1], 'begin', 'last', 'end')
if not run[2] then
	return false
end
local oldest = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)
return {run[1], run[2], run[3], oldest[1] and oldest[1][1]}
