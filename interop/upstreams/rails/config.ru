# Streams of five events, half a second apart, that say when each was made.
require 'action_controller/railtie'

class StreamsController < ActionController::Base
  include ActionController::Live

  def show
    response.headers['Content-Type'] = 'text/event-stream'
    response.headers['Last-Modified'] = Time.now.httpdate if params[:last_modified]
    1.upto(5) do |n|
      response.stream.write "id: #{n}\ndata: {\"n\":#{n},\"time\":#{Time.now.to_f}}\n\n"
      sleep 0.5
    end
  ensure
    response.stream.close
  end
end

class Streams < Rails::Application
  config.eager_load = false
  config.logger = Logger.new($stdout)
  config.secret_key_base = 'none'
  config.hosts = []
  routes.append { get '/events', to: 'streams#show' }
end

Streams.initialize!
run Streams
