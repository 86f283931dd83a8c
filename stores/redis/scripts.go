package redis

import (
	"crypto/sha1"
	"encoding/hex"
)

// A run has two keys. The first is a hash with the run's begin (b), the number of
// its newest event (l) and its end (e). The second is a stream with an entry
// <n>-0 for event n. Scripts change both at once.

// script is a script that the server knows by its hash.
type script struct {
	text string
	sha  string
}

func newScript(text string) script {
	sum := sha1.Sum([]byte(text))
	return script{text, hex.EncodeToString(sum[:])}
}

// writeScript changes a run. Keys: hash, stream. Arguments: channel, milliseconds
// to stay, oldest event to keep, begin or nothing, end or nothing, the most bytes
// of events for a notice, the event that must be there, then numbers and data of
// events. It returns 0 and changes nothing if the run is not there, or if events
// are missing. Its notice has the number of the first new event, and the length
// and data of each; or nothing.
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

// touchScript makes keys stay. Argument: milliseconds.
var touchScript = newScript(`
for _, key in ipairs(KEYS) do
	redis.call('PEXPIRE', key, ARGV[1])
end
return 1
`)

// findScript returns a run's begin, the number of its newest event, the number of
// the oldest event that is kept or nothing, and its end or nothing. Keys: hash,
// stream.
var findScript = newScript(`
local run = redis.call('HMGET', KEYS[1], 'b', 'l', 'e')
if not run[2] then
	return false
end
local first = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)
return {run[1], run[2], first[1] and string.match(first[1][1], '^%d+') or '', run[3] or ''}
`)

// readScript returns the end of a run or nothing, and then numbers and data of
// events. It returns the end together with the last event. Keys: hash, stream.
// Arguments: the number after which the events begin, and about how many bytes to
// return.
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

// renewScript renews the lease of a node. A server that is full sets no key, but
// can extend the life of one. Key: the lease. Argument: milliseconds.
var renewScript = newScript(`
if redis.call('PEXPIRE', KEYS[1], ARGV[1]) == 0 then
	redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
end
return 1
`)

// sendScript leaves messages for a node. Key: its stream of messages. Arguments:
// channel, milliseconds to stay, how many messages may wait, messages.
var sendScript = newScript(`
for i = 4, #ARGV do
	redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[3], '*', 'm', ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PUBLISH', ARGV[1], '')
return 1
`)

// receiveScript returns the ids and texts of the messages after the last one that
// the node has received, and removes those before that one. If its reply is lost,
// the call can be repeated. The last received message stays in the stream. If it
// is missing, the server has lost its older messages and may have another clock
// now, so all messages are new. Key: the stream. Arguments: the id of the last
// received message, how many messages to return.
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
