package redis

import (
	"crypto/sha1"
	"encoding/hex"
)

// A run is two keys: a hash with what it began with (b), the number of its newest
// event (l) and its end (e), and a stream with an entry <n>-0 for event n. Scripts
// change both at once.

// script is one that the server knows by its hash.
type script struct {
	text string
	sha  string
}

func newScript(text string) script {
	sum := sha1.Sum([]byte(text))
	return script{text, hex.EncodeToString(sum[:])}
}

// writeScript changes a run. Keys: hash, stream. Arguments: channel, milliseconds
// to stay, oldest event to keep, what it begins with or nothing, end or nothing,
// how many bytes a notice may have, the event that there must be, then numbers and
// data of events. It returns 0, and changes nothing, where there is no such run, or
// not all of it. Its notice has the number of the first new event, and of each its
// length and data, or nothing.
var writeScript = newScript(`
local last = redis.call('HGET', KEYS[1], 'l')
local before = tonumber(last or 0)
if not last and ARGV[4] == '' or before < tonumber(ARGV[7]) or ARGV[8] and tonumber(ARGV[8]) > before + 1 then
	return 0
end
if not last then
	redis.call('DEL', KEYS[2])
	redis.call('HSET', KEYS[1], 'l', 0, 'b', ARGV[4])
end
last = before
local told, room = {}, tonumber(ARGV[6])
for i = 8, #ARGV, 2 do
	local n = tonumber(ARGV[i])
	if n > last then
		redis.call('XADD', KEYS[2], ARGV[i] .. '-0', 'd', ARGV[i + 1])
		room = room - #ARGV[i + 1]
		if room >= 0 then
			told[#told + 1] = (last == before and ARGV[i] .. ' ' or '') .. #ARGV[i + 1] .. ' ' .. ARGV[i + 1]
		end
		last = n
	end
end
if last > before then
	redis.call('HSET', KEYS[1], 'l', string.format('%.0f', last))
end
if tonumber(ARGV[3]) > 1 then
	redis.call('XTRIM', KEYS[2], 'MINID', '~', ARGV[3])
end
if ARGV[5] ~= '' then
	redis.call('HSET', KEYS[1], 'e', ARGV[5])
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
redis.call('PUBLISH', ARGV[1], (room >= 0 and ARGV[5] == '') and table.concat(told) or '')
return 1
`)

// dropScript removes a run. Keys: hash, stream. Argument: channel.
var dropScript = newScript(`
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('PUBLISH', ARGV[1], '')
return 1
`)

// touchScript has keys stay. Argument: milliseconds.
var touchScript = newScript(`
for _, key in ipairs(KEYS) do
	redis.call('PEXPIRE', key, ARGV[1])
end
return 1
`)

// findScript returns what a run began with, the number of its newest event, the
// number of the oldest one that is kept or nothing, and its end or nothing. Keys:
// hash, stream.
var findScript = newScript(`
local run = redis.call('HMGET', KEYS[1], 'b', 'l', 'e')
if not run[2] then
	return false
end
local first = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)
return {run[1], run[2], first[1] and string.match(first[1][1], '^%d+') or '', run[3] or ''}
`)

// readScript returns the end of a run or nothing, and after it numbers and data
// of events. Keys: hash, stream. Arguments: the number after which they begin, and
// how many bytes are about enough. The end comes with the last event.
var readScript = newScript(`
local run = redis.call('HMGET', KEYS[1], 'l', 'e')
local last, enough = run[1], tonumber(ARGV[2])
if not last then
	return false
end
local found, bytes, at, count = {''}, 0, ARGV[1], 8
local complete = tonumber(at) >= tonumber(last)
while not complete and (bytes < enough or #found == 1) do
	local some = redis.call('XRANGE', KEYS[2], '(' .. at .. '-0', '+', 'COUNT', count)
	complete = #some == 0 -- what should be there has been lost
	for _, entry in ipairs(some) do
		if bytes >= enough and #found > 1 then
			break
		end
		at = string.match(entry[1], '^%d+')
		found[#found + 1] = at
		found[#found + 1] = entry[2][2]
		bytes = bytes + #entry[2][2]
		complete = at == last
	end
	count = math.min(2 * count, 128)
end
if complete then
	found[1] = run[2] or ''
end
return found
`)

// renewScript has a node live. A server that is full sets no key, but lets one
// stay. Key: the lease. Argument: milliseconds.
var renewScript = newScript(`
if redis.call('PEXPIRE', KEYS[1], ARGV[1]) == 0 then
	redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
end
return 1
`)

// sendScript leaves messages for a node. Key: the stream of them. Arguments: channel,
// milliseconds to stay, how many may wait, messages.
var sendScript = newScript(`
for i = 4, #ARGV do
	redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[3], '*', 'm', ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PUBLISH', ARGV[1], '')
return 1
`)

// receiveScript removes the messages for a node before the last one that has come,
// and returns the ids and texts of those after it. That one stays. Where it is not
// there, all others are new: the server has forgotten the older ones, and may have
// another clock now. A call whose answer was lost can be made again. Key: the stream.
// Arguments: the id of the last one that has come, how many to return.
var receiveScript = newScript(`
local from = '-'
if #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) > 0 then
	redis.call('XTRIM', KEYS[1], 'MINID', ARGV[1])
	from = '(' .. ARGV[1]
end
local found = {}
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', ARGV[2])) do
	found[#found + 1] = entry[1]
	found[#found + 1] = entry[2][2]
end
return found
`)
