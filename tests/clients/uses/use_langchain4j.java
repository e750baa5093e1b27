// Uses langchain4j's OpenAI models over the JDK's HTTP client, its default, which offers HTTP/2 on every request:
// whole, streamed, completions, a schema and a tool that is called.

import dev.langchain4j.agent.tool.ToolSpecification;
import dev.langchain4j.data.message.UserMessage;
import dev.langchain4j.model.chat.request.ChatRequest;
import dev.langchain4j.model.chat.request.ResponseFormat;
import dev.langchain4j.model.chat.request.ResponseFormatType;
import dev.langchain4j.model.chat.request.ToolChoice;
import dev.langchain4j.model.chat.request.json.JsonObjectSchema;
import dev.langchain4j.model.chat.request.json.JsonSchema;
import dev.langchain4j.model.chat.response.ChatResponse;
import dev.langchain4j.model.chat.response.StreamingChatResponseHandler;
import dev.langchain4j.model.openai.OpenAiChatModel;
import dev.langchain4j.model.openai.OpenAiLanguageModel;
import dev.langchain4j.model.openai.OpenAiStreamingChatModel;
import java.util.List;
import java.util.concurrent.CompletableFuture;

class UseLangchain4j {
  static void check(boolean holds, Object what) {
    if (!holds) throw new AssertionError(what);
  }

  static OpenAiChatModel model(String url, int maxTokens) {
    return OpenAiChatModel.builder()
        .baseUrl(url)
        .apiKey("none")
        .modelName("smollm2")
        .temperature(0.0)
        .maxTokens(maxTokens)
        .strictJsonSchema(true)
        .timeout(java.time.Duration.ofMinutes(10))
        .maxRetries(0)
        .build();
  }

  static void wholeAndStreamed(String url) throws Exception {
    String question = "What is the capital of France?";
    ChatResponse whole = model(url, 8).chat(UserMessage.from(question));
    check(!whole.aiMessage().text().isBlank() && whole.tokenUsage().outputTokenCount() >= 1, whole);
    StringBuilder streamed = new StringBuilder();
    CompletableFuture<ChatResponse> end = new CompletableFuture<>();
    OpenAiStreamingChatModel streaming =
        OpenAiStreamingChatModel.builder()
            .baseUrl(url)
            .apiKey("none")
            .modelName("smollm2")
            .temperature(0.0)
            .maxTokens(8)
            .timeout(java.time.Duration.ofMinutes(10))
            .build();
    streaming.chat(
        question,
        new StreamingChatResponseHandler() {
          @Override
          public void onPartialResponse(String piece) {
            streamed.append(piece);
          }

          @Override
          public void onCompleteResponse(ChatResponse response) {
            end.complete(response);
          }

          @Override
          public void onError(Throwable error) {
            end.completeExceptionally(error);
          }
        });
    ChatResponse response = end.get();
    check(response.aiMessage().text().equals(whole.aiMessage().text()), response);
    check(streamed.toString().equals(whole.aiMessage().text()), streamed);
    check(response.tokenUsage().outputTokenCount().equals(whole.tokenUsage().outputTokenCount()), response.tokenUsage());
  }

  static void schema(String url) {
    JsonObjectSchema city =
        JsonObjectSchema.builder().addEnumProperty("city", List.of("Paris", "Rome")).required("city").build();
    ResponseFormat format =
        ResponseFormat.builder()
            .type(ResponseFormatType.JSON)
            .jsonSchema(JsonSchema.builder().name("capital").rootElement(city).build())
            .build();
    UserMessage message = UserMessage.from("The capital of France is Paris.");
    ChatRequest request = ChatRequest.builder().messages(message).responseFormat(format).build();
    String text = model(url, 128).chat(request).aiMessage().text();
    check(text.matches("\\{\\s*\"city\"\\s*:\\s*\"(Paris|Rome)\"\\s*\\}"), text);
  }

  static void tool(String url) {
    JsonObjectSchema city =
        JsonObjectSchema.builder().addEnumProperty("city", List.of("Paris", "Rome")).required("city").build();
    ToolSpecification weather =
        ToolSpecification.builder().name("weather").description("Tell the weather.").parameters(city).build();
    ChatRequest request =
        ChatRequest.builder()
            .messages(UserMessage.from("What is the weather in Paris?"))
            .toolSpecifications(weather)
            .toolChoice(ToolChoice.REQUIRED)
            .build();
    var calls = model(url, 128).chat(request).aiMessage().toolExecutionRequests();
    check(!calls.isEmpty() && calls.get(0).name().equals("weather"), calls);
    check(calls.get(0).arguments().matches("\\{\\s*\"city\"\\s*:\\s*\"(Paris|Rome)\"\\s*\\}"), calls);
  }

  public static void main(String[] arguments) throws Exception {
    String url = arguments[0] + "/v1";
    wholeAndStreamed(url);
    OpenAiLanguageModel completions =
        OpenAiLanguageModel.builder().baseUrl(url).apiKey("none").modelName("smollm2").temperature(0.0).build();
    check(completions.generate("One, two,").content().contains("three"), "completions");
    schema(url);
    tool(url);
    System.exit(0);
  }
}
